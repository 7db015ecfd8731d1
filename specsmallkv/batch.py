"""Continuous batching: several sequences share the passes of both models; one that ends makes room for the next.

Every row keeps a `Sequence`, a generator and stop ids of its own. A pass packs the tokens of its rows end to end,
as many as each has: one or two pending tokens, k drafts or fewer before a limit or an eviction. Nothing is padded, so
nothing is to be taken back, and row i is what the same prompt is alone (invariant 6). A new prompt is read alone,
then joins. Token ids only, as in `decode.py`, whose verbs do the work.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import drafting
from .decode import Decoder
from .sequence import Counters, Round, Sequence
from .speculation import accept


@dataclass(frozen=True)
class Job:
    """One prompt that waits for a row."""

    prompt: list[int]
    max_new_tokens: int
    stop_ids: set[int] = field(default_factory=set)
    seed: int = 0
    compress_after: int | None = None


@dataclass
class Row:
    """A job in work; number: its place in the queue. Whoever reads its tokens may set `stopped`."""

    number: int
    job: Job
    sequence: Sequence
    generator: torch.Generator
    started: float  # when its prompt began to be read
    stopped: bool = False
    # the present round: what it drafts with which distributions, and what the draft reads next
    num_drafts: int = 0
    drafts: list[int] = field(default_factory=list)
    probabilities: list[Tensor | None] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def begin(self, num_drafts: int) -> None:
        """A new round: the draft has yet to read one token, or those since it last read its whole cache."""
        self.num_drafts, self.drafts, self.probabilities = num_drafts, [], []
        self.pending = self.sequence.tokens[self.sequence.draft.seen :] if self.sequence.draft else []

    def take(self, draft: int, distribution: Tensor | None) -> None:
        self.drafts.append(draft)
        self.probabilities.append(distribution)
        self.pending = [draft]

    @property
    def finished(self) -> bool:
        tokens = self.sequence.tokens
        return self.stopped or len(tokens) >= self.sequence.limit or tokens[-1] in self.job.stop_ids


@dataclass
class BatchCounters(Counters):
    """Sums over all rows, with seconds of the phases that they share. held: bytes of all rows at the fullest pass."""

    verify_passes: int = 0
    held: dict[str, int] = field(default_factory=dict)

    def see_rows(self, rows: list[Row]) -> None:
        self.verify_passes += 1
        self.last_target_bytes = sum(row.sequence.counters.last_target_bytes for row in rows)
        if self.last_target_bytes >= self.max_target_bytes:
            self.max_target_bytes, held = self.last_target_bytes, [row.sequence.held() for row in rows]
            self.held = {key: sum(own[key] for own in held) for key in held[0]}


class BatchDecoder:
    """Decodes up to `batch_size` sequences at once with the models, the policy and the settings of `decoder`."""

    def __init__(self, decoder: Decoder, batch_size: int):
        decoder.shard.check_alone(f"A batch of {batch_size}")
        self.decoder, self.batch_size = decoder, batch_size
        self.counters = BatchCounters()

    @torch.inference_mode()
    def generate(self, jobs: Iterable[Job]) -> Iterator[tuple[Row, Round]]:
        """Rounds of all rows as they come; the first one of a row is its prompt's next token."""
        queue, rows = enumerate(jobs), list[Row]()
        while True:
            while len(rows) < self.batch_size and (following := next(queue, None)):
                rows.append(self.admit(*following))
                yield rows[-1], Round(rows[-1].sequence.tokens[-1:])
                rows = [row for row in rows if not row.finished]
            if not rows:
                return
            yield from zip(rows, self.round(rows), strict=True)
            rows = [row for row in rows if not row.finished]

    def admit(self, number: int, job: Job) -> Row:
        """A row whose prompt the target has read, alone, with the token that follows it."""
        decoder, started = self.decoder, time.perf_counter()
        sequence, logits = decoder.begin(job.prompt, job.max_new_tokens, job.compress_after)
        generator = torch.Generator(decoder.device).manual_seed(job.seed)
        decoder.first(sequence, logits, generator)
        return Row(number, job, sequence, generator, started)

    def round(self, rows: list[Row]) -> list[Round]:
        """One verify pass for all rows with everything around it; what follows the pass is each row's own."""
        decoder, counters = self.decoder, self.counters
        for row in rows:
            decoder.settle(row.sequence)
            decoder.decide(row.sequence)
        with counters.timed("draft"):
            self.draft(rows)
        with counters.timed("plan"):
            for row in rows:
                decoder.plan(row.sequence, row.drafts)
        with counters.timed("verify"):
            logits = decoder.verify_group([row.sequence for row in rows], [row.drafts for row in rows])
            counters.see_rows(rows)
            verdicts = [
                accept(row.drafts, row.probabilities, own, decoder.sampler, row.generator)
                for row, own in zip(rows, logits, strict=True)
            ]
        with counters.timed("evict"):
            rounds = [
                decoder.conclude(row.sequence, row.drafts, *verdict, row.job.stop_ids)
                for row, verdict in zip(rows, verdicts, strict=True)
            ]
        for round_ in rounds:
            counters.add(len(round_.tokens), round_.num_drafted, round_.num_accepted)
        return rounds

    def draft(self, rows: list[Row]) -> None:
        """Drafts of all rows, step by step; a row that has its drafts sits the further steps out."""
        decoder, step = self.decoder, 0
        for row in rows:
            row.begin(drafting.begin(decoder, row.sequence))
        while active := [row for row in rows if step < row.num_drafts]:
            logits = decoder.draft_group([row.sequence for row in active], [row.pending for row in active])
            for row, own in zip(active, logits, strict=True):
                row.take(*decoder.propose(row.sequence, own, row.generator))
                if step == 0:
                    drafting.send_ahead(decoder, row.sequence)
                    drafting.view_rest(decoder, row.sequence, row.num_drafts)
            step += 1
        if last := [row for row in rows if drafting.lacks_rows(row.sequence, row.num_drafts)]:
            tokens = [drafting.unread(row.sequence, row.drafts) for row in last]
            decoder.draft_group([row.sequence for row in last], tokens, "none")
