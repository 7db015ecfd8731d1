"""One sequence in work: its tokens, its caches, its evidence and its figures. `decode.py` has the verbs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .attention import AttentionRows
from .cache import TieredCache
from .controller import Decision, History
from .draft_view import DraftView
from .oracle import AttentionOracle
from .policies import Evidence
from .trimmed_head import ContextTokens


@dataclass
class Round:
    """What one verify pass gave: the emitted tokens (accepted drafts, then correction or bonus); drafts: proposed."""

    tokens: list[int]
    num_drafted: int = 0
    num_accepted: int = 0
    drafts: list[int] = field(default_factory=list)


@dataclass
class Counters:
    """Sums over the rounds after prefill; seconds per phase, by the clock and of the CPU."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    undrafted: int = 0  # rounds that drafted nothing
    new_entries: list[float] = field(default_factory=list)
    max_target_bytes: int = 0
    full_bytes_then: int = 0
    last_target_bytes: int = 0
    prefill_bytes: int = 0  # most that the target's cache held while it read the prompt; 0: it went on from another
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    recall_seconds: float = 0.0  # of moving memory, a part of other phases
    # of the drafting steps: bytes of K and V that they had to read, the same for each query of theirs, and the queries
    draft_kv_read: int = 0
    draft_kv_attended: int = 0
    draft_rows: int = 0
    catch_ups: int = 0  # passes of a draft that had waited

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.cpu_seconds[phase] = self.cpu_seconds.get(phase, 0.0) + time.process_time() - cpu_start

    def add(self, emitted: int, drafted: int, accepted: int) -> None:
        self.rounds += 1
        self.emitted += emitted
        self.drafted += drafted
        self.accepted += accepted
        self.undrafted += not drafted

    def see_draft(self, nbytes: int, num_rows: int) -> None:
        self.draft_kv_read += nbytes
        self.draft_kv_attended += nbytes * num_rows
        self.draft_rows += num_rows

    def see_prefill(self, cache: TieredCache) -> None:
        self.prefill_bytes = max(self.prefill_bytes, cache.nbytes)

    def see(self, cache: TieredCache) -> None:
        """Note what the device cache holds, and its fullest moment."""
        self.last_target_bytes = used = cache.nbytes
        if used >= self.max_target_bytes:
            self.max_target_bytes, self.full_bytes_then = used, cache.full_nbytes


@dataclass
class Sequence:
    """One sequence in work. tokens: prompt and output; the last one is not yet in the target's cache."""

    tokens: list[int]
    limit: int  # longest `tokens` may become
    target: TieredCache
    draft: TieredCache | None
    evidence: Evidence
    evicted_at: int  # committed length of the last eviction event; the prompt's at first
    settled: bool = False  # the draft has read the prompt and static policies have compressed it
    logits: Tensor | None = None  # of the last verify pass, (k + 1, V), or of the prompt's end, (1, V): for observers
    counters: Counters = field(default_factory=Counters)
    decision: Decision | None = None  # for the present round; None: as the decoder is set
    history: History = field(default_factory=History)
    view: DraftView | None = None  # what the draft's steps read while it is open, instead of the whole cache
    reread: bool = False  # in the present round the draft has read the block once more, for rows
    last_row: AttentionRows | None = None  # of the draft's last first step that a view followed
    context_tokens: ContextTokens | None = None  # what the draft may propose besides its head's own

    @property
    def reading(self) -> AttentionOracle | None:
        """The oracle, if it reads in the present round."""
        return self.evidence.oracle if self.decision is None or self.decision.reads else None

    @property
    def waits(self) -> bool:
        """Whether in the last round the oracle read nothing; a draft whose rows it wants by the next eviction lags."""
        return self.decision is not None and not self.decision.reads

    @property
    def watched_row(self) -> AttentionRows | None:
        """Where the row of the round's first step goes, if a view is to follow it and no oracle reads."""
        row = self.last_row if self.reading is None else None
        return row if row is not None and row.first_position == len(self.tokens) - 1 else None

    @property
    def in_view(self) -> bool:
        return self.view is not None and self.view.start is not None

    def close_view(self) -> None:
        """The draft's cache as if it had never been looked at through a view."""
        if self.view is not None:
            self.view.close()

    def held(self) -> dict[str, int]:
        """Bytes that lie in memory now, counted from the tensors; keys as in the record."""
        oracle, mass, view, row = self.evidence.oracle, self.evidence.mass, self.view, self.last_row
        last = self.evidence.last
        steps = (view.nbytes if view else 0) + (row.nbytes if row and not oracle else 0)
        steps += self.context_tokens.nbytes if self.context_tokens else 0
        return {
            "target_kv_bytes": self.target.nbytes,
            "target_kv_bytes_full": self.target.full_nbytes,
            "target_kv_allocated_bytes": self.target.allocated_nbytes,
            "target_kv_host_bytes": self.target.host_nbytes,
            "target_kv_window_bytes": self.target.window_nbytes,
            "draft_kv_bytes": self.draft.held_nbytes if self.draft else 0,
            "scratch_bytes": (oracle.nbytes if oracle else 0)
            + (mass.nbytes if mass else 0)
            + (last.nbytes if last else 0)
            + self.evidence.nbytes
            + self.target.sent_nbytes
            + steps,
        }


def next_tokens(sequences: list[Sequence], drafts: list[list[int]]) -> list[list[int]]:
    """What a verify pass reads of each sequence: the last token and its drafts."""
    return [[sequence.tokens[-1], *own] for sequence, own in zip(sequences, drafts, strict=True)]
