"""What a step of distillation reads: a function of the seed and the step alone, so that a resumed run is the same."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distill_data import Lessons


@dataclass(frozen=True)
class Settings:
    layers: list[int]  # target layers that the draft starts from
    tokens: int  # trained on in all; fixes the schedule
    batch_size: int = 4  # sequences a step; a long step has one
    long_every: int = 8  # every so many steps is a long one; 0: never
    answers_share: float = 0.5  # of the short sequences
    lr: float = 1e-3
    warmup: float = 0.05  # share of the steps
    attention_loss_weight: float = 0.5
    loss_temperature: float = 1.0  # of both distributions in the KL
    average: float = 0.98  # decay of the running mean of the weights that is exported
    gradient_checkpointing: bool = False
    checkpoint_minutes: float = 5.0
    seed: int = 0

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then a cosine to a fiftieth."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@dataclass
class Curriculum:
    """Which lessons a step reads. text or answers may be missing, and long."""

    text: Lessons | None
    answers: Lessons | None
    long: Lessons | None
    settings: Settings

    def __post_init__(self) -> None:
        s, short = self.settings, self.text or self.answers
        assert short is not None, "nothing to read"
        self.every = s.long_every if self.long is not None else 0
        self.share = 1.0 if self.text is None else s.answers_share if self.answers is not None else 0.0
        self.short_tokens = s.batch_size * short.ids.shape[1]
        self.long_tokens = self.long.ids.shape[1] if self.long is not None else 0

    def tokens(self, steps: int) -> int:
        """Seen in the first `steps` steps."""
        long = steps // self.every if self.every else 0
        return (steps - long) * self.short_tokens + long * self.long_tokens

    @property
    def steps(self) -> int:
        cycle = self.every or 1
        return max(1, round(self.settings.tokens * cycle / self.tokens(cycle)))

    @property
    def readings(self) -> dict[str, tuple[Lessons, float]]:
        """Of each kind of sequence, how often the whole run reads one of them."""
        long = self.steps // self.every if self.every else 0
        short = (self.steps - long) * self.settings.batch_size
        answered = math.floor(short * self.share)
        kinds = {"text": (self.text, short - answered), "answers": (self.answers, answered), "long": (self.long, long)}
        return {kind: (lessons, n / len(lessons.ids)) for kind, (lessons, n) in kinds.items() if lessons is not None}

    def lesson(self, step: int) -> list[tuple[Lessons, list[int]]]:
        """Groups of sequences of equal length and their indices."""
        s, before = self.settings, step // self.every if self.every else 0
        if self.every and step % self.every == self.every - 1:
            assert self.long is not None
            return [(self.long, self.long.pick(before, 1, s.seed))]
        first, last = (step - before) * s.batch_size, (step - before + 1) * s.batch_size
        answered = [math.floor(n * self.share) for n in (first, last)]
        groups = []
        if self.answers is not None and answered[1] > answered[0]:
            groups.append((self.answers, self.answers.pick(answered[0], answered[1] - answered[0], s.seed)))
        plain = [n - a for n, a in zip((first, last), answered, strict=True)]
        if self.text is not None and plain[1] > plain[0]:
            groups.append((self.text, self.text.pick(plain[0], plain[1] - plain[0], s.seed)))
        return groups

    def read(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids (B, T), positions (R,) of the rows, and what the target made of them."""
        groups = self.lesson(step)
        parts = [lessons.read(picks) for lessons, picks in groups]
        wanted = {name: torch.cat([answer[name] for _, answer in parts]) for name in parts[0][1]}
        return torch.cat([ids for ids, _ in parts]), groups[0][0].positions, wanted
