"""task=distill: make a draft for the configured target (docs/make-a-draft.md) and write it as a loadable directory."""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..attention_form import refuse_windows
from ..config import RunConfig
from ..display import Display
from ..distill import Curriculum, Settings, Trainer, build_draft, busiest_layers, even_layers, export, train
from ..distill_data import Lessons, cut_conversations, cut_text
from ..distill_report import agreed_tokens, agreement, attention_recalls, curve_svg, speculate
from ..distill_text import sample_batch
from ..errors import UserError
from ..hub_text import SCHEME, hub_text
from ..models import ModelPair, load_pair
from ..prompts import Request, read_requests_file, read_text
from ..trimmed_head import frequent_tokens
from ..weights import fingerprint

EVAL_LENGTH, EVAL_SEQUENCES, EVAL_ANSWER, EVAL_DRAFTS = 512, 20, 128, 3
MEASURED = 1024  # tokens on which layers are compared
CHOICES = ("even", "busiest")
PROMPT_LIMIT, ANSWER_TOKENS, ANSWER_BATCH = 320, 208, 64


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
        if self.output_dir is None or not self.text_files:
            raise UserError("task=distill needs task.text_files=[FILE,...] and task.output_dir=DIR; set both.")
        output = Path(self.output_dir).expanduser()
        display = Display(config.quiet)
        with display.waiting("loading the model"):
            pair = load_pair(replace(config.model, linear="torch", compile=None), need_draft=False, quiet=config.quiet)
        refuse_windows("task=distill", pair.target.config)
        texts = [tokens_of(pair, "task.text_files", path) for path in self.text_files]
        output.mkdir(parents=True, exist_ok=True)
        settings = self._settings(config.seed, self._layers(pair, texts[0]))
        talks = self._conversations(pair, output / "answers.jsonl", config.seed, display) if self.prompts_file else []
        draft = build_draft(pair.target, settings.layers, self._head(pair, [texts, talks]))
        trainer = Trainer(pair.target, draft, self._curriculum(pair, texts, talks, output, settings), settings)
        if self.start_from is not None:
            trainer.start_from(self.start_from)
        checkpoint = output / "checkpoint.safetensors"
        if self.resume and checkpoint.exists():
            trainer.load(checkpoint)
        train_with_progress(trainer, output, self._facts(config, pair, settings.layers), display)
        report = self._report(pair, trainer, output)
        return {
            "model": config.model.name,
            "dtype": str(pair.target.dtype).removeprefix("torch."),
            "device": str(pair.target.device),
            "output_dir": str(output),
        } | report

    def _layers(self, pair: ModelPair, text: list[int]) -> list[int]:
        """As named, or the given number: spread evenly, or those that do most on the beginning of the first text."""
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

    def _head(self, pair: ModelPair, kinds: list[list[list[int]]]) -> Tensor | None:
        """Which tokens the draft can propose: special ones and the most frequent of texts and of conversations."""
        vocab_size = pair.target.config.vocab_size
        if self.head_tokens is None or self.head_tokens >= vocab_size:
            return None
        always = pair.special_token_ids
        if self.head_tokens < len(always):
            raise UserError(
                f"task.head_tokens={self.head_tokens} is below the {len(always)} special tokens; raise it."
            )
        return frequent_tokens(kinds, self.head_tokens, vocab_size, always)

    def _facts(self, config: RunConfig, pair: ModelPair, layers: list[int]) -> dict[str, object]:
        return {
            "shares_embeddings": True,
            "target": config.model.target,
            "target_fingerprint": fingerprint(pair.target),
            "target_layers": layers,
            "attention_loss_weight": self.attention_loss_weight,
            "seed": config.seed,
        }

    def _curriculum(
        self, pair: ModelPair, texts: list[list[int]], talks: list[list[int]], output: Path, settings: Settings
    ) -> Curriculum:
        """Running text is cut to so many pieces that each is read `repeats` times; all conversations are used."""
        run = [token for ids in texts for token in ids]
        per_cycle = (self.long_every - 1) * self.batch_size * self.seq_len if self.long_every else 1
        long_share = self.long_len / (per_cycle + self.long_len) if self.long_every else 0.0
        plain = (1 - long_share) * (1 - (self.answers_share if talks else 0.0))
        wanted = self.tokens / self.repeats

        def lessons(ids: Tensor, repeats: float = math.inf) -> Lessons:
            keep = output / "target" / fingerprint(pair.target) if repeats > 1 else None
            return Lessons(ids, pair.target, keep, self.attention_loss_weight > 0)

        def pieces(length: int, share: float) -> Lessons | None:
            count = max(1, round(wanted * share / length))
            return lessons(cut_text(run, length, count), self.repeats) if share else None

        text = pieces(self.seq_len, plain or 1e-9)
        assert text is not None
        if not len(text.ids):
            raise UserError(f"task.text_files hold only {len(run)} tokens; give at least task.seq_len={self.seq_len}.")
        long = pieces(self.long_len, long_share) if len(run) >= self.long_len else None
        answers = cut_conversations(talks, self.seq_len)
        return Curriculum(text, lessons(answers) if len(answers) else None, long, settings)

    def _conversations(self, pair: ModelPair, path: Path, seed: int, display: Display) -> list[list[int]]:
        """Prompts and the target's own answers; only those not yet answered are asked, in batches of like length."""
        requests = read_requests_file("task.prompts_file", str(self.prompts_file), chat=None)
        prompts = [prompt for prompt in (encode_chat(pair, r) for r in requests) if len(prompt) < PROMPT_LIMIT]
        if not prompts:
            raise UserError(
                f"task.prompts_file={self.prompts_file} has no prompt below {PROMPT_LIMIT} tokens; give shorter ones."
            )
        made_by = {"target": fingerprint(pair.target), "seed": seed, "temperature": self.temperature}
        done = read_answers(path, made_by)
        prompts.sort(key=lambda ids: (len(ids), ids))
        missing = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in done]
        for start in range(0, len(missing), ANSWER_BATCH):
            batch = missing[start : start + ANSWER_BATCH]
            first = len(done)  # so a run that was stopped goes on as it would have
            heat = [0.0 if (first + i) % 5 < 2 else self.temperature for i in range(len(batch))]
            generator = torch.Generator().manual_seed(seed * 1000 + first)
            answers = sample_batch(pair.target, batch, heat, ANSWER_TOKENS, pair.eos_token_ids, generator)
            rows = [made_by | {"prompt_ids": p, "answer_ids": a} for p, a in zip(batch, answers, strict=True)]
            with path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            done |= {tuple(prompt): answer for prompt, answer in zip(batch, answers, strict=True)}
            display.console.print(f"{min(start + ANSWER_BATCH, len(missing))} of {len(missing)} prompts answered")
        return [prompt + done[tuple(prompt)] for prompt in shuffled(prompts, seed)]

    def _report(self, pair: ModelPair, trainer: Trainer, output: Path) -> dict[str, Any]:
        """`report.json` and `curve.svg`."""
        trainer.use_averages()
        report = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            **self._text_figures(pair, trainer),
            **self._answer_figures(pair, trainer),
        }
        (output / "report.json").write_text(json.dumps(report) + "\n")
        curve = read_curve(output / "curve.jsonl")
        (output / "curve.svg").write_text(
            curve_svg([int(p["tokens"]) for p in curve], [p["agreement"] for p in curve])
        )
        return report

    def _text_figures(self, pair: ModelPair, trainer: Trainer) -> dict[str, float | None]:
        """On pieces spread evenly over the held-out text."""
        if self.eval_text_file is None:
            return dict.fromkeys(("agreement", "attention_recall", "attention_recall_target"))
        ids = cut_text(tokens_of(pair, "task.eval_text_file", str(self.eval_text_file)), EVAL_LENGTH, EVAL_SEQUENCES)
        if not len(ids):
            raise UserError(f"task.eval_text_file={self.eval_text_file} is too short; give {EVAL_LENGTH} tokens.")
        ids = ids.long().to(pair.target.device)
        recalls = attention_recalls(pair.target, trainer.draft, trainer.mixture.detach(), ids)
        return {
            "agreement": agreement(pair.target, trainer.draft, ids),
            "attention_recall": recalls[0],
            "attention_recall_target": recalls[1],
        }

    def _answer_figures(self, pair: ModelPair, trainer: Trainer) -> dict[str, float | None]:
        """Along the target's greedy answers to the held-out prompts."""
        if self.eval_prompts_file is None:
            return dict.fromkeys(("answer_agreement", "acceptance_rate", "acceptance_length"))
        requests = read_requests_file("task.eval_prompts_file", str(self.eval_prompts_file), chat=None)
        prompts, answers = [encode_chat(pair, request) for request in requests], list[list[int]]()
        for start in range(0, len(prompts), ANSWER_BATCH):
            batch, greedy = prompts[start : start + ANSWER_BATCH], torch.Generator()
            answers += sample_batch(pair.target, batch, [0.0] * len(batch), EVAL_ANSWER, pair.eos_token_ids, greedy)
        agreed = agreed_tokens(trainer.draft, prompts, answers)
        rounds = [speculate(own, EVAL_DRAFTS, EVAL_ANSWER) for own in agreed]
        drafted, accepted, passes, emitted = (sum(column) for column in zip(*rounds, strict=True))
        return {
            "answer_agreement": sum(map(sum, agreed)) / max(1, sum(map(len, agreed))),
            "acceptance_rate": accepted / max(1, drafted),
            "acceptance_length": emitted / max(1, passes),
        }


def read_curve(path: Path) -> list[dict[str, float]]:
    """One point per step; a run that was killed and resumed wrote some steps twice."""
    points = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return list({point["step"]: point for point in points}.values())


def train_with_progress(trainer: Trainer, output: Path, facts: dict[str, object], display: Display) -> None:
    columns = (BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=display.console) as progress:
        bar = progress.add_task("", total=trainer.steps, completed=trainer.step, shown="")
        began, seen = time.monotonic(), trainer.tokens

        def on_step(step: int, losses: dict[str, float]) -> None:
            speed = (trainer.tokens - seen) / (time.monotonic() - began)
            shown = f"{speed:.0f} tokens/s, KL {losses['kl']:.3f}, "
            progress.update(bar, completed=step, shown=shown + f"agreement {losses['agreement']:.3f}")

        def on_checkpoint() -> None:
            export(trainer, output / "draft", facts | {"tokens": trainer.tokens})

        train(trainer, output, on_step, on_checkpoint)


def tokens_of(pair: ModelPair, key: str, path: str) -> list[int]:
    content = hub_text(key, path) if path.startswith(SCHEME) else read_text(key, path)
    return pair.tokenizer(content)["input_ids"]


def encode_chat(pair: ModelPair, request: Request) -> list[int]:
    if not getattr(pair.tokenizer, "chat_template", None):
        raise UserError("task.prompts_file needs a target with a chat template, which this one lacks; leave it out.")
    messages = request.messages or [{"role": "user", "content": request.prompt or ""}]
    text = pair.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return pair.tokenizer(text, add_special_tokens=False)["input_ids"]


def shuffled(prompts: list[list[int]], seed: int) -> list[list[int]]:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[i] for i in order.tolist()]


def read_answers(path: Path, made_by: dict[str, Any]) -> dict[tuple[int, ...], list[int]]:
    """What an earlier run of the same target, seed and temperature got; a kill may have cut the last line."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        rows = [json.loads(line) for line in whole]
        own = [row for row in rows if {key: row.get(key) for key in made_by} == made_by]
        answers = {tuple(row["prompt_ids"]): row["answer_ids"] for row in own}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} holds no answers of an earlier run; remove it or set another task.output_dir."
        ) from None
    path.write_text("".join(whole), encoding="utf-8")
    return answers
