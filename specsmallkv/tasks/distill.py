"""task=distill: make a draft for the configured target (docs/make-a-draft.md) and write it as a loadable directory."""

import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..attention_form import refuse_windows
from ..config import RunConfig
from ..display import Display
from ..distill import Trainer, earlier_facts, earlier_weights, export, refuse_other_layers, train
from ..distill_build import build_draft, busiest_layers, even_layers
from ..distill_curriculum import Curriculum, Settings
from ..distill_data import Lessons, cut_conversations, cut_text
from ..distill_report import curve_svg
from ..errors import UserError
from ..hub_text import tokens_of
from ..memory import is_out_of_memory, shortage
from ..models import ModelPair, load_pair
from ..trimmed_head import frequent_tokens
from ..weights import fingerprint
from .distill_answers import conversations, read_prompts
from .distill_held_out import HeldOut

MEASURED = 1024  # tokens on which layers are compared
LESS_MEMORY = "lower task.batch_size or task.long_len, or set task.gradient_checkpointing=true"
CHOICES = ("even", "busiest")


@dataclass
class DistillTask:
    """What the keys mean: conf/task/distill.yaml."""

    name: str
    text_files: list[str]
    prompts_file: str | None
    output_dir: str | None
    layers: Any
    layer_choice: str
    head_tokens: int | None
    start_from: str | None
    tokens: int
    repeats: int
    seq_len: int
    batch_size: int
    long_len: int
    long_every: int
    answers_share: float
    lr: float
    warmup: float
    attention_loss_weight: float
    loss_temperature: float
    average: float
    gradient_checkpointing: bool
    temperature: float
    checkpoint_minutes: float
    eval_text_file: str | None
    eval_prompts_file: str | None
    resume: bool

    def __post_init__(self) -> None:
        rules = {
            "tokens": (1, math.inf),
            "repeats": (1, math.inf),
            "seq_len": (2, math.inf),
            "batch_size": (1, math.inf),
            "long_len": (2, math.inf),
            "long_every": (0, math.inf),
            "answers_share": (0, 1),
            "lr": (1e-12, 1),
            "warmup": (0, 1),
            "attention_loss_weight": (0, 1e6),
            "loss_temperature": (1e-3, 1e3),
            "average": (0, 1),
            "temperature": (0, 1e6),
            "checkpoint_minutes": (0, math.inf),
        }
        if self.layer_choice not in CHOICES:
            raise UserError(f"task.layer_choice={self.layer_choice} is unknown; choose one of {', '.join(CHOICES)}.")
        for key, (least, most) in rules.items():
            if not least <= getattr(self, key) <= most:
                limits = f"{least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
                raise UserError(f"task.{key}={getattr(self, key)} is not possible; give {limits}.")

    def run(self, config: RunConfig) -> dict[str, Any]:
        if self.output_dir is None or not (self.text_files or self.prompts_file):
            raise UserError(
                "task=distill needs task.output_dir=DIR and task.text_files=[FILE,...] or task.prompts_file=FILE."
            )
        output = Path(self.output_dir).expanduser()
        display = Display(config.quiet)
        with display.waiting("loading the model"):
            pair = load_pair(replace(config.model, linear="torch", compile=None), need_draft=False, quiet=config.quiet)
        refuse_windows("task=distill", pair.target.config)
        if len(set(getattr(pair.target, "hf_device_map", {}).values())) > 1:
            raise UserError("task=distill needs the whole target on one device; set model.device=cuda:0, or cpu.")
        material = self._material(pair, display)
        output.mkdir(parents=True, exist_ok=True)
        trainer = self._trainer(config, pair, material, output, display)
        try:
            train_with_progress(trainer, output, self._facts(config, pair, trainer), display)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError(f"{shortage(error)}; {LESS_MEMORY}.") from error
            raise
        return {
            "model": config.model.name,
            "dtype": str(pair.target.dtype).removeprefix("torch."),
            "device": str(pair.target.device),
            "output_dir": str(output),
        } | self._report(pair, trainer, material.held_out, output)

    def _material(self, pair: ModelPair, display: Display) -> "Material":
        """All that is read from files, before anything is computed: a wrong name costs no time."""
        if self.start_from is not None:
            earlier_weights(self.start_from)
        return Material(
            [tokens_of(pair.tokenizer, "task.text_files", path) for path in self.text_files],
            read_prompts(pair, str(self.prompts_file), display.console) if self.prompts_file else [],
            HeldOut.read(pair, self.eval_text_file, self.eval_prompts_file),
        )

    def _trainer(
        self, config: RunConfig, pair: ModelPair, material: "Material", output: Path, display: Display
    ) -> Trainer:
        """With the state of the checkpoint, if there is one."""
        texts, prompts, kept = material.texts, material.prompts, output / "answers.jsonl"
        layers = self._layers(pair, [token for ids in (texts or prompts) for token in ids[:MEASURED]])
        self._check_head(pair)
        if self.start_from is not None:
            refuse_other_layers(self.start_from, layers)
        talks = conversations(pair, prompts, kept, config.seed, self.temperature, display.console) if prompts else []
        settings = self._settings(config.seed, layers)
        curriculum = self._curriculum(pair, texts, talks, output, settings)
        self._tell(curriculum, display.console)
        draft = build_draft(pair.target, layers, self._head(pair, [texts, talks]))
        trainer = Trainer(pair.target, draft, curriculum, settings)
        if self.start_from is not None:
            trainer.start_from(self.start_from)
        checkpoint = output / "checkpoint.safetensors"
        if self.resume and checkpoint.exists():
            trainer.load(checkpoint)
        return trainer

    def _layers(self, pair: ModelPair, text: list[int]) -> list[int]:
        """As named, or the given number: spread evenly, or those that do most on the beginning of what is read."""
        count = pair.target.config.num_hidden_layers
        if isinstance(self.layers, int) and 1 <= self.layers <= count:
            if self.layer_choice == "even":
                return even_layers(count, self.layers)
            return busiest_layers(pair.target, self.layers, torch.tensor([text[:MEASURED]], device=pair.target.device))
        if isinstance(self.layers, int) or not self.layers or any(i not in range(count) for i in self.layers):
            raise UserError(
                f"task.layers={self.layers} does not fit a target of {count} layers; name some of 0-{count - 1}, or "
                f"how many."
            )
        return list(self.layers)

    def _settings(self, seed: int, layers: list[int]) -> Settings:
        return Settings(
            layers,
            self.tokens,
            self.batch_size,
            self.long_every,
            self.answers_share,
            self.lr,
            self.warmup,
            self.attention_loss_weight,
            self.loss_temperature,
            self.average,
            self.gradient_checkpointing,
            self.checkpoint_minutes,
            seed,
        )

    def _check_head(self, pair: ModelPair) -> None:
        always = len(pair.special_token_ids)
        if self.head_tokens is not None and self.head_tokens < min(always, pair.target.config.vocab_size):
            raise UserError(f"task.head_tokens={self.head_tokens} is below the {always} special tokens; raise it.")

    def _head(self, pair: ModelPair, kinds: list[list[list[int]]]) -> Tensor | None:
        """Which tokens the draft can propose: special ones and the most frequent of texts and of conversations."""
        vocab_size = pair.target.config.vocab_size
        if self.head_tokens is None or self.head_tokens >= vocab_size:
            return None
        return frequent_tokens(kinds, self.head_tokens, vocab_size, pair.special_token_ids)

    def _facts(self, config: RunConfig, pair: ModelPair, trainer: Trainer) -> dict[str, Any]:
        """What the draft's config.json says of its training; `tokens` are those of the runs before it."""
        before = earlier_facts(self.start_from).get("tokens", 0) if self.start_from is not None else 0
        return {
            "tokens": before,
            "shares_embeddings": True,
            "target": config.model.target,
            "target_fingerprint": fingerprint(pair.target),
            "target_layers": trainer.settings.layers,
            "attention_loss_weight": self.attention_loss_weight,
            "seed": config.seed,
        }

    def _curriculum(
        self, pair: ModelPair, texts: list[list[int]], talks: list[list[int]], output: Path, settings: Settings
    ) -> Curriculum:
        """Running text is cut to so many pieces that each is read `repeats` times; all conversations are used."""
        run = [token for ids in texts for token in ids]
        per_cycle = (self.long_every - 1) * self.batch_size * self.seq_len if self.long_every else 1
        has_long = self.long_every and len(run) >= self.long_len
        long_share = self.long_len / (per_cycle + self.long_len) if has_long else 0.0
        plain = (1 - long_share) * (1 - (self.answers_share if talks else 0.0))
        wanted = self.tokens / self.repeats

        def lessons(ids: Tensor, repeats: float = math.inf) -> Lessons:
            keep = output / "target" / f"{fingerprint(pair.target)}-{pair.target.dtype}" if repeats > 1 else None
            return Lessons(ids, pair.target, keep, self.attention_loss_weight > 0)

        def pieces(length: int, share: float) -> Lessons | None:
            count = max(1, round(wanted * share / length))
            return lessons(cut_text(run, length, count), self.repeats) if share and len(run) >= length else None

        text, long = pieces(self.seq_len, plain or 1e-9), pieces(self.long_len, long_share)
        answers = cut_conversations(talks, self.seq_len)
        for key, found, short in (
            ("text_files", sum(map(len, texts)), texts and text is None),
            ("prompts_file", sum(map(len, talks)), talks and not len(answers)),
        ):
            if short:
                raise UserError(f"task.{key} comes to only {found} tokens; give at least task.seq_len={self.seq_len}.")
        curriculum = Curriculum(text, lessons(answers) if len(answers) else None, long, settings)
        check_disk(output, curriculum)
        return curriculum

    def _tell(self, curriculum: Curriculum, console: Console) -> None:
        """How often each kind of sequence is read: too few texts are read over and over."""
        for kind, (lessons, times) in curriculum.readings.items():
            count, length = lessons.ids.shape
            console.print(f"{kind}: {count:,} sequences of {length} tokens, each read {times:.1f} times")
            if kind != "answers" and times > 1.5 * self.repeats:
                console.print(f"  oftener than task.repeats={self.repeats}: give more text, or lower task.tokens")
        if self.long_every and curriculum.long is None:
            console.print(f"no long sequences: the texts have fewer than task.long_len={self.long_len} tokens")

    def _report(self, pair: ModelPair, trainer: Trainer, held_out: HeldOut, output: Path) -> dict[str, Any]:
        """`report.json` and `curve.svg`."""
        trainer.use_averages()
        report = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            **held_out.on_text(pair, trainer),
            **held_out.on_answers(pair, trainer.draft),
        }
        (output / "report.json").write_text(json.dumps(report) + "\n")
        if curve := read_curve(output / "curve.jsonl"):
            svg = curve_svg([int(p["tokens"]) for p in curve], [p["agreement"] for p in curve])
            (output / "curve.svg").write_text(svg)
        return report


class Material(NamedTuple):
    """Token ids: texts, prompts that the target is to answer, and what the draft is judged on."""

    texts: list[list[int]]
    prompts: list[list[int]]
    held_out: HeldOut


def check_disk(output: Path, curriculum: Curriculum) -> None:
    """What the target says is kept in files that grow as it reads; a full disk would end the run without a word."""
    needed = sum(lessons.missing_bytes * min(1.0, times) for lessons, times in curriculum.readings.values())
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"task.output_dir={output} has {free / 2**30:.1f} GiB free, and what the target says of the sequences "
            f"takes {needed / 2**30:.1f}; free some, set task.repeats=1, or lower task.tokens."
        )


def read_curve(path: Path) -> list[dict[str, float]]:
    """One point per step; a run that was killed and resumed wrote some steps twice."""
    points = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return list({point["step"]: point for point in points}.values())


def train_with_progress(trainer: Trainer, output: Path, facts: dict[str, Any], display: Display) -> None:
    columns = (BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=display.console) as progress:
        bar = progress.add_task("", total=trainer.steps, completed=trainer.step, shown="")
        began, seen = time.monotonic(), trainer.tokens

        def on_step(step: int, losses: dict[str, float]) -> None:
            speed = (trainer.tokens - seen) / (time.monotonic() - began)
            shown = f"{speed:.0f} tokens/s, KL {losses['kl']:.3f}, "
            progress.update(bar, completed=step, shown=shown + f"agreement {losses['agreement']:.3f}")

        def on_checkpoint() -> None:
            export(trainer, output / "draft", facts | {"tokens": facts["tokens"] + trainer.tokens})

        train(trainer, output, on_step, on_checkpoint)
