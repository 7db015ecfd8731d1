"""task=distill: make a draft for the configured target (docs/make-a-draft.md) and write it as a loadable directory."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import RunConfig
from ..display import Display
from ..distill import Settings, Trainer, agreement, export, train
from ..distill_text import TokenStream, sample_batch
from ..errors import UserError
from ..models import ModelPair, fingerprint, load_pair
from ..prompts import Request, read_requests_file, read_text

EVAL_LENGTH, EVAL_SEQUENCES = 512, 20
PROMPT_LIMIT, ANSWER_TOKENS, ANSWER_BATCH = 320, 192, 64


@dataclass
class DistillTask:
    """text_files: UTF-8 texts. prompts_file: JSONL {"prompt": ...}, answered by the target once, into
    output_dir/answers.jsonl. layers: target layers that the draft starts from. The rest as in distill.Settings;
    eval_text_file: held-out text for the agreement. resume: go on from output_dir's checkpoint."""

    name: str
    text_files: list[str]
    prompts_file: str | None
    output_dir: str | None
    layers: list[int]
    tokens: int
    seq_len: int
    batch_size: int
    long_every: int
    answers_share: float
    lr: float
    warmup: float
    attention_loss_weight: float
    temperature: float
    checkpoint_minutes: float
    eval_text_file: str | None
    resume: bool

    def __post_init__(self) -> None:
        rules = {
            "tokens": (1, math.inf),
            "seq_len": (2, math.inf),
            "batch_size": (1, math.inf),
            "long_every": (0, math.inf),
            "answers_share": (0, 1),
            "lr": (1e-12, 1),
            "warmup": (0, 1),
            "attention_loss_weight": (0, 1e6),
            "temperature": (0, 1e6),
            "checkpoint_minutes": (0, math.inf),
        }
        for key, (least, most) in rules.items():
            if not least <= getattr(self, key) <= most:
                limits = f"{least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
                raise UserError(f"task.{key}={getattr(self, key)} is not possible; give {limits}.")

    def run(self, config: RunConfig) -> dict[str, Any]:
        if self.output_dir is None or not self.text_files:
            raise UserError("task=distill needs task.text_files=[FILE,...] and task.output_dir=DIR; set both.")
        output = Path(self.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        display = Display(config.quiet)
        with display.waiting("loading the model"):
            pair = load_pair(replace(config.model, linear="torch"), need_draft=False, quiet=config.quiet)
        self._check_layers(pair.target.config.num_hidden_layers)
        settings = self._settings(config.seed)
        trainer = Trainer(pair.target, self._streams(pair, output, config.seed, display), settings)
        checkpoint = output / "checkpoint.safetensors"
        if self.resume and checkpoint.exists():
            trainer.load(checkpoint)
        facts = self._facts(config, pair)
        train_with_progress(trainer, output, facts, display)
        report: dict[str, Any] = {
            "steps": trainer.step,
            "tokens": trainer.step * settings.step_tokens,
            "agreement": None,
        }
        if self.eval_text_file is not None:
            report["agreement"] = self._agreement(pair, trainer)
        (output / "report.json").write_text(json.dumps(report) + "\n")
        return {
            "model": config.model.name,
            "dtype": str(pair.target.dtype).removeprefix("torch."),
            "device": str(pair.target.device),
            "output_dir": str(output),
        } | report

    def _check_layers(self, count: int) -> None:
        if not self.layers or any(i not in range(count) for i in self.layers):
            raise UserError(
                f"task.layers={self.layers} does not fit a target of {count} layers; name some of 0-{count - 1}."
            )

    def _settings(self, seed: int) -> Settings:
        return Settings(
            list(self.layers),
            self.tokens,
            self.seq_len,
            self.batch_size,
            self.long_every,
            self.answers_share if self.prompts_file else 0.0,
            self.lr,
            self.warmup,
            self.attention_loss_weight,
            self.checkpoint_minutes,
            seed,
        )

    def _facts(self, config: RunConfig, pair: ModelPair) -> dict[str, object]:
        return {
            "shares_embeddings": True,
            "target": config.model.target,
            "target_fingerprint": fingerprint(pair.target),
            "target_layers": list(self.layers),
            "attention_loss_weight": self.attention_loss_weight,
            "seed": config.seed,
        }

    def _streams(self, pair: ModelPair, output: Path, seed: int, display: Display) -> list[TokenStream]:
        """Running text, and conversations of the target with itself."""
        texts = [tokens_of(pair, "task.text_files", path) for path in self.text_files]
        streams = [TokenStream(texts, aligned=False)]
        if self.prompts_file is not None:
            streams.append(
                TokenStream(self._conversations(pair, output / "answers.jsonl", seed, display), aligned=True)
            )
        return streams

    def _conversations(self, pair: ModelPair, path: Path, seed: int, display: Display) -> list[list[int]]:
        requests = read_requests_file("task.prompts_file", str(self.prompts_file), chat=None)
        prompts = [prompt for prompt in (encode_chat(pair, r) for r in requests) if len(prompt) < PROMPT_LIMIT]
        if not prompts:
            raise UserError(
                f"task.prompts_file={self.prompts_file} has no prompt below {PROMPT_LIMIT} tokens; give shorter ones."
            )
        done = read_answers(path, prompts)
        with path.open("a") as file:
            for start in range(len(done), len(prompts), ANSWER_BATCH):
                batch = prompts[start : start + ANSWER_BATCH]
                heat = [0.0 if i % 5 < 2 else self.temperature for i in range(len(batch))]
                generator = torch.Generator().manual_seed(seed * 1000 + start)
                answers = sample_batch(pair.target, batch, heat, ANSWER_TOKENS, pair.eos_token_ids, generator)
                for prompt, answer in zip(batch, answers, strict=True):
                    file.write(json.dumps({"prompt_ids": prompt, "answer_ids": answer}) + "\n")
                    done.append({"prompt_ids": prompt, "answer_ids": answer})
                file.flush()
                display.console.print(f"{len(done)} of {len(prompts)} prompts answered")
        return [row["prompt_ids"] + row["answer_ids"] for row in done]

    def _agreement(self, pair: ModelPair, trainer: Trainer) -> float:
        ids = torch.tensor(tokens_of(pair, "task.eval_text_file", str(self.eval_text_file)))
        count = min(EVAL_SEQUENCES, len(ids) // EVAL_LENGTH)
        if not count:
            raise UserError(
                f"task.eval_text_file={self.eval_text_file} has only {len(ids)} tokens; give {EVAL_LENGTH}."
            )
        return agreement(pair.target, trainer.draft, ids[: count * EVAL_LENGTH].view(count, -1).to(pair.target.device))


def train_with_progress(trainer: Trainer, output: Path, facts: dict[str, object], display: Display) -> None:
    columns = (BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, console=display.console) as progress:
        bar = progress.add_task("", total=trainer.settings.steps, completed=trainer.step, shown="")

        def on_step(step: int, losses: dict[str, float]) -> None:
            speed = progress.tasks[0].speed or 0.0
            shown = f"{speed * trainer.settings.step_tokens:.0f} tokens/s, KL {losses['kl']:.3f}, "
            progress.update(bar, completed=step, shown=shown + f"agreement {losses['agreement']:.3f}")

        def on_checkpoint() -> None:
            seen = trainer.step * trainer.settings.step_tokens
            export(trainer, output / "draft", facts | {"tokens": seen})

        train(trainer, output, on_step, on_checkpoint)


def tokens_of(pair: ModelPair, key: str, path: str) -> list[int]:
    return pair.tokenizer(read_text(key, path))["input_ids"]


def encode_chat(pair: ModelPair, request: Request) -> list[int]:
    if not getattr(pair.tokenizer, "chat_template", None):
        raise UserError("task.prompts_file needs a target with a chat template, which this one lacks; leave it out.")
    messages = request.messages or [{"role": "user", "content": request.prompt or ""}]
    text = pair.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return pair.tokenizer(text, add_special_tokens=False)["input_ids"]


def read_answers(path: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The rows of an earlier run, in whole batches: a kill may have cut the last line, and a batch has one seed."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    whole = len(lines) if len(lines) == len(prompts) else len(lines) // ANSWER_BATCH * ANSWER_BATCH
    try:
        rows = [json.loads(line) for line in lines[:whole]]
        same = [row["prompt_ids"] for row in rows] == prompts[:whole]
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{path} holds answers to other prompts; remove it, or give another task.output_dir.")
    path.write_text("".join(lines[:whole]), encoding="utf-8")
    return rows
