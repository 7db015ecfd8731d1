"""The controller: how many tokens a round drafts, whether it speculates at all, and whether the oracle reads in it.

`Controller` is fixed. `Adaptive` (opt-in, since measured costs depend on the machine's load) takes the number of
drafts with the most tokens a second: with k drafts, each accepted with the running rate a, a pass emits
1 + a + ... + a^k tokens (Leviathan et al., arXiv 2211.17192) and takes what the cost table says at this length. From a
saved table a decision follows from the sequence's own drafts alone. Where no number pays, a round of one draft
tries again after a pause, and each pause in vain is followed by one twice as long.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import drafting
from .config import SpeculationConfig
from .errors import UserError

if TYPE_CHECKING:
    from .decode import Decoder
    from .sequence import Sequence

PRIOR_RATE, PRIOR_TRIALS = 0.5, 2.0  # what a sequence believes before its first draft
MEMORY = 0.95  # weight of a draft's verdict once another one is there
GAIN = 1.03  # tokens a second over plain decoding's, below which speculation is not worth its risk
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024  # rounds without speculation between two tries
READ_SHARE = 0.05  # of a round: an oracle that takes less reads in every one
SAME_CONTEXT, SHORT = 2.0, 256  # lengths within this factor, or below this one, have one row of measured costs
DRY_REPEATS = 2


class Decision(NamedTuple):
    """What a round does. reads: the oracle looks at the draft's rows; lookahead policies choose anew by them.

    view_size: tokens of its own cache that the draft's steps read (`draft_view.py`); 0: all.
    catches_up: the draft first reads what it waited with.
    """

    num_draft_tokens: int
    reads: bool = True
    view_size: int = 0
    catches_up: bool = False


@dataclass
class History:
    """What one sequence's decisions are made from, besides costs: verdicts on its drafts, and its pauses in rounds."""

    accepted: float = PRIOR_RATE * PRIOR_TRIALS
    trials: float = PRIOR_TRIALS
    pause: int = 0
    next_pause: int = FIRST_PAUSE
    unread: int = 0  # rounds since the oracle last read
    read_at: int | None = None  # the eviction event that was the last one then

    @property
    def rate(self) -> float:
        """Chance that a draft is accepted if all before it are."""
        return self.accepted / self.trials

    def note(self, drafted: int, accepted: int) -> None:
        """A round's verdict: so many drafts accepted, and one rejected if there were more."""
        for verdict in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.accepted, self.trials = MEMORY * self.accepted + verdict, MEMORY * self.trials + 1
        if 0 < drafted == accepted:
            self.pause = 0


@dataclass(frozen=True)
class Costs:
    """Seconds at one context length, tokens. draft: one step; read: of the oracle, its step of the draft and the plan;

    plan: of `read`. verify: passes over 1, 2, ... tokens. first: what the first step takes more than others
    (`draft_view.py`), negative where the oracle's step is the first one of drafting: its price then stands in `read`.
    """

    context: int
    draft: float
    read: float
    verify: tuple[float, ...]
    first: float = 0.0
    plan: float = 0.0

    def reading(self, num_drafts: int) -> float:
        """What the oracle adds to a round: the plan alone where its step is one of drafting."""
        return self.plan if self.first < 0 < num_drafts else self.read

    def round(self, num_drafts: int) -> float:
        """With an oracle that reads."""
        return self.draft * num_drafts + self.first * (num_drafts > 0) + self.read + self.verify[num_drafts]


@dataclass
class CostTable:
    """Costs by context length, ascending; between two lengths they are interpolated, outside the nearest holds."""

    rows: list[Costs] = field(default_factory=list)

    def add(self, costs: Costs) -> None:
        self.rows = sorted([*self.rows, costs], key=lambda row: row.context)

    def covers(self, context: int) -> bool:
        lengths = [max(row.context, SHORT) / max(context, SHORT) for row in self.rows]
        return any(1 / SAME_CONTEXT <= length <= SAME_CONTEXT for length in lengths)

    def at(self, context: int) -> Costs:
        """The table must have a row."""
        below = [row for row in self.rows if row.context <= context] or self.rows[:1]
        above = [row for row in self.rows if row.context > context] or self.rows[-1:]
        low, high = below[-1], above[0]
        share = (context - low.context) / max(high.context - low.context, 1)
        share = min(max(share, 0.0), 1.0)

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        verify = tuple(between(a, b) for a, b in zip(low.verify, high.verify, strict=False))
        names = ("draft", "read", "first", "plan")
        draft, read, first, plan = (between(getattr(low, x), getattr(high, x)) for x in names)
        return Costs(context, draft, read, verify, first, plan)

    def plain(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def load_cost_table(source: str, made_for: Mapping[str, str] | None = None) -> CostTable:
    """A record of an adaptive run, or the list under its `cost_table` alone. Raises UserError.

    made_for: what a record has to be of, by key; a list says nothing of itself.
    """
    remedy = "give the record of a run with speculation=adaptive"
    try:
        found = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
        rows = found["cost_table"] if isinstance(found, dict) else found
        costs = [Costs(**x | {"verify": tuple(map(float, x["verify"]))}) for x in rows]
        least = [min(row.draft, row.plan, row.read, row.first + row.draft, *row.verify) for row in costs]
        if not costs or min(least) < 0 or any(len(row.verify) < 2 for row in costs):
            raise ValueError("it has no costs")
    except OSError as error:
        raise UserError(f"speculation.cost_table={source} cannot be read ({error.strerror}); {remedy}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"speculation.cost_table={source} holds no cost table ({error}); {remedy}.") from error
    for key, value in (made_for or {}).items() if isinstance(found, dict) else ():
        if found.get(key, value) != value:
            raise UserError(
                f"speculation.cost_table={source} was measured with {key}={found[key]}, not {value}; {remedy} of the "
                "same, or its cost_table list alone to take it all the same."
            )
    return CostTable(sorted(costs, key=lambda row: row.context))


def best_count(costs: Costs, rate: float, most: int, waits: bool = False) -> int:
    """The number of drafts, at most `most`, with the most tokens a second; 0 unless it gains enough over 0.

    waits: a round without drafts has no oracle's step, which is put off to the next eviction and not counted.
    """
    emitted, best, best_speed = 1.0, 0, GAIN / (costs.verify[0] if waits else costs.round(0))
    for count in range(1, min(most, len(costs.verify) - 1) + 1):
        emitted += rate**count
        speed = emitted / costs.round(count)
        if speed > best_speed:
            best, best_speed = count, speed
    return best


def next_count(costs: Costs, history: History, most: int, waits: bool = False) -> int:
    """`best_count` with tries and pauses, which it notes in the history."""
    if history.pause:
        history.pause -= 1
        return 0
    count = best_count(costs, history.rate, most, waits)
    if count:
        history.next_pause = FIRST_PAUSE
        return count
    history.pause, history.next_pause = history.next_pause, min(2 * history.next_pause, LONGEST_PAUSE)
    return min(1, most)


@dataclass
class Controller:
    """A fixed number of drafts. oracle_every: of so many rounds the oracle reads in one, at least after each eviction.

    It always reads where its rows decide what stays for good, or what each query reads on its own. view_size: tokens
    that the draft's steps read of a long cache (`draft_view.py`); 0: all.
    """

    oracle_every: int = 1
    view_size: int = field(default=0, kw_only=True)
    measures = False  # decides by times that only this process sees

    def decide(self, decoder: "Decoder", sequence: "Sequence") -> None:
        self.decide_reads(decoder, sequence)

    def decide_reads(self, decoder: "Decoder", sequence: "Sequence") -> None:
        """Whether the oracle reads, and nothing else: for trials, whose drafts are given."""
        self._take(decoder, sequence, decoder.num_draft_tokens)

    def anew(self) -> "Controller":
        """The same for another policy, whose costs are its own."""
        return self

    def _take(self, decoder: "Decoder", sequence: "Sequence", count: int, every: int | None = None) -> None:
        history, policy = sequence.history, decoder.policy
        chooses = policy.every_round and policy.selection == "block" and not policy.reads_target
        chooses = chooses and not policy.marginal_share  # whose weights are of each block's own queries
        optional = chooses and history.read_at == sequence.evicted_at and policy.due(sequence.evicted_at)
        reads = not optional or history.unread + 1 >= (every or self.oracle_every)
        history.unread, history.read_at = 0 if reads else history.unread + 1, sequence.evicted_at
        sequence.decision = Decision(count, reads, self.view_size)


@dataclass
class Adaptive(Controller):
    """By costs and acceptance. table: a saved one; else costs are measured, once for each doubling of the length."""

    table: CostTable = field(default_factory=CostTable)

    def __post_init__(self) -> None:
        self.measures = not self.table.rows

    def anew(self) -> Controller:
        return replace(self, table=CostTable()) if self.measures else self

    def decide(self, decoder: "Decoder", sequence: "Sequence") -> None:
        context, most = sequence.target.seen, decoder.num_draft_tokens
        if decoder.policy.evicts:  # no verify pass sees past an eviction
            most = min(most, decoder.policy.evict_block - 1)
        if sequence.draft is not None and self.measures and not self.table.covers(context):
            sequence.decision = Decision(most, catches_up=sequence.waits)
            if drafting.begin(decoder, sequence) == most > 0:  # else an eviction or the end is near: next time
                with sequence.counters.timed("measure"):
                    self.table.add(measure(decoder, sequence, most))
        if sequence.draft is None or not self.table.rows:
            super().decide(decoder, sequence)
        else:
            costs = self.table.at(context)
            count = next_count(costs, sequence.history, most, decoder.can_wait(sequence))
            cheap = costs.reading(count) < READ_SHARE * costs.round(count)
            self._take(decoder, sequence, count, 1 if cheap else None)


def measure(decoder: "Decoder", sequence: "Sequence", most: int) -> Costs:
    """Costs at the sequence's length, from rounds that are taken back; the first one warms up."""
    dry_round(decoder, sequence, most)
    seconds = {}
    for count in {0, 1, most}:
        runs = [dry_round(decoder, sequence, count) for _ in range(DRY_REPEATS)]
        seconds[count] = {phase: min(run[phase] for run in runs) for phase in ("draft", "plan", "verify")}
    first, last = seconds[1]["verify"], seconds[most]["verify"]
    slope = (last - first) / max(most - 1, 1)
    verify = (seconds[0]["verify"], *(first + slope * (count - 1) for count in range(1, most + 1)))
    steps = {count: seconds[count]["draft"] - seconds[0]["draft"] for count in seconds}
    step = max(0.0, (steps[most] - steps[1]) / (most - 1) if most > 1 else steps[1])
    plan = min(own["plan"] for own in seconds.values())
    read = seconds[0]["draft"] + plan
    least = 0.0 if decoder.policy.lookahead == "block" else -step  # what reads the first row is then a drafting step
    return Costs(sequence.target.seen, step, read, verify, max(least, steps[1] - step), plan)


def dry_round(decoder: "Decoder", sequence: "Sequence", count: int) -> dict[str, float]:
    """Seconds of the phases of a round with `count` drafts, all of which is rolled back, figures included."""
    kept = sequence.counters, sequence.logits, [layer.recall_bytes for layer in sequence.target.layers]
    oracle, last = sequence.evidence.oracle, sequence.evidence.last
    recent = oracle.recent_rows if oracle else None
    counters = sequence.counters = type(sequence.counters)()
    sequence.decision = Decision(count, view_size=decoder.controller.view_size if decoder.controller else 0)
    generator = torch.Generator(decoder.device).manual_seed(0)
    with counters.timed("draft"):
        drafts, _ = decoder.draft(sequence, generator)
    with counters.timed("plan"):
        decoder.plan(sequence, drafts)
    with counters.timed("verify"):
        decoder.verify(sequence, drafts).argmax(dim=-1).tolist()  # waits for the device
    decoder.rollback(sequence, len(drafts) + 1)
    sequence.counters, sequence.logits, recalled = kept
    sequence.last_row, sequence.evidence.last = None, last
    if oracle is not None:
        oracle.recent_rows = recent
    for layer, own in zip(sequence.target.layers, recalled, strict=True):
        layer.recall_bytes = own
    return counters.seconds


def make_controller(config: SpeculationConfig, model: str, policy: str) -> Controller | None:
    """What a configuration asks for of this model and policy; None: every round alike, the oracle reads in each."""
    if config.adaptive:
        of = {"model": model, "policy": policy}
        table = CostTable() if config.cost_table is None else load_cost_table(config.cost_table, of)
        return Adaptive(config.oracle_every, table, view_size=config.draft_view_size)
    fixed = config.oracle_every == 1 and not config.draft_view_size
    return None if fixed else Controller(config.oracle_every, view_size=config.draft_view_size)
