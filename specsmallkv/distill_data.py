"""What a distilled draft is trained on: sequences of token ids, and what the target says and looks at on each.

A sequence is read several times but by the target only once: its answer is kept in files. Which sequences a step reads
follows from the seed and the step alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .distill_loss import RowRecorder, hidden_states

NUM_ROWS = 8  # query positions per sequence whose attention is compared


def cut_text(ids: list[int], length: int, count: int) -> Tensor:
    """(count or fewer, length): pieces of one run of token ids, spread evenly over it."""
    whole = len(ids) // length
    picks = torch.linspace(0, max(whole - 1, 0), min(count, whole)).long().tolist()
    return torch.tensor([ids[i * length : (i + 1) * length] for i in picks], dtype=torch.int32).view(-1, length)


def cut_conversations(conversations: list[list[int]], length: int) -> Tensor:
    """(N, length): every piece begins where a conversation begins; one that was cut begins the next piece."""
    run = [token for ids in conversations for token in ids]
    bounds = torch.tensor([0, *map(len, conversations)]).cumsum(0)
    pieces, first = [], 0
    while first < len(conversations) and int(bounds[first]) + length <= len(run):
        start = int(bounds[first])
        pieces.append(run[start : start + length])
        first = max(first + 1, int(torch.searchsorted(bounds, start + length, right=True)) - 1)
    return torch.tensor(pieces, dtype=torch.int32).view(-1, length)


@dataclass
class Lessons:
    """Sequences (N, T) and the target's reading of each. directory: where it is kept; None: read anew every time."""

    ids: Tensor
    target: PreTrainedModel
    directory: Path | None
    with_rows: bool

    def __post_init__(self) -> None:
        count, length = self.ids.shape
        stride = max(1, length // NUM_ROWS)
        self.positions = torch.arange(stride - 1, length, stride)[:NUM_ROWS]
        self.drawn: tuple[tuple[int, int], Tensor] | None = None  # the order that was asked for last
        self.digest = hashlib.sha256(f"{tuple(self.ids.shape)}".encode() + self.ids.numpy().tobytes()).hexdigest()[:16]
        config = self.target.config
        heads = config.num_hidden_layers * config.num_attention_heads
        self.shapes: dict[str, tuple[int, ...]] = {"hidden": (length, config.hidden_size)}
        if self.with_rows:
            self.shapes["rows"] = (heads, len(self.positions), length)
        if self.directory is not None:
            self.kept = {name: self._file(name, (count, *shape), torch.float16) for name, shape in self.shapes.items()}
            self.done = self._file("done_with_rows" if self.with_rows else "done", (count,), torch.uint8)

    def _file(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that is a (sparse) file; a kill leaves what was written."""
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.digest}.{name}"
        size = int(torch.tensor(shape).prod())
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def pick(self, draw: int, count: int, seed: int) -> list[int]:
        """Indices of draws `draw`, ...: every sequence once before any comes again."""
        total = len(self.ids)
        return [int(self._order(seed, index // total)[index % total]) for index in range(draw, draw + count)]

    def _order(self, seed: int, reading: int) -> Tensor:
        """(N,): in which order the sequences come in their n-th reading."""
        if self.drawn is None or self.drawn[0] != (seed, reading):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + reading)
            self.drawn = (seed, reading), torch.randperm(len(self.ids), generator=generator)
        return self.drawn[1]

    @property
    def missing_bytes(self) -> int:
        """What the directory will take when the target has read every sequence."""
        if self.directory is None:
            return 0
        return int((self.done == 0).sum()) * sum(kept[0].nbytes for kept in self.kept.values())

    def read(self, picks: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """ids (B, T) and the target's hidden (B, T, d) and rows (B, A, R, T), float16 as they are kept."""
        ids = self.ids[picks].long().to(self.target.device)
        if self.directory is None:
            return ids, self._ask(ids)
        new = [i for i in picks if not self.done[i]]
        if new:
            for name, value in self._ask(self.ids[new].long().to(self.target.device)).items():
                self.kept[name][new] = value.cpu()
            self.done[new] = 1
        return ids, {name: kept[picks].to(self.target.device) for name, kept in self.kept.items()}

    @torch.no_grad()
    def _ask(self, ids: Tensor) -> dict[str, Tensor]:
        recorder = RowRecorder(self.positions.to(ids.device)) if self.with_rows else None
        answer = {"hidden": hidden_states(self.target, ids, recorder).half()}
        return answer | ({"rows": recorder.rows().half()} if recorder else {})
