"""Teacher-forced trials: several policies and the full cache read one text in the same passes of the target.

The first tokens of the text are the prompt, which is read once; every trial begins with a copy of the target's cache.
What follows is read in verify blocks: the draft reads a block once, the target in one pass with a batch row for each
trial. So all are compared on the same positions, rounding in passes of one shape is no distance, and a trial costs
little more than its share of attention. Sets are chosen for the whole block, as in decoding; the target then reads
only its scored positions, which the drafts behind them cannot change.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from .attention import AttentionCall, AttentionMass
from .cache import TieredCache
from .decode import Decoder
from .draft_view import DraftView, is_viewed
from .errors import UserError
from .generator import SpecSmallKV
from .metrics import Scores, attention_recall, jaccard_of_top
from .policies import Policy
from .presets import load_policy
from .sequence import Sequence

BLOCK_ROWS = ("drafted", "gold")  # whose tokens a verify block brings: the draft's, or the text's own
MEASURE_EVERY = 8  # blocks between two looks at the attention itself, which costs a full read


@dataclass
class Block:
    """A verify block that begins with the text's token at `position`; the first `count` positions are scored.

    A position is scored if every token read up to it is the text's own. proposed: the draft's drafts, not the text's.
    measure: look at the attention itself too.
    """

    position: int
    drafts: list[int]
    count: int
    proposed: bool
    measure: bool


@dataclass
class Trial:
    """One policy at one budget: its own target cache, the shared draft. The full cache is a trial as well.

    budget: of `task.kv_budgets`, by which trials are compared; the policy's own may differ (bytes matched in total).
    over_decoding: (tokens since the prompt, Jaccard, attention recall) of each block that was looked at.
    recalled: of each block, the bytes moved for it, and the full cache's then for each of its tokens.
    """

    policy: Policy
    budget: float
    decoder: Decoder
    sequence: Sequence
    scores: Scores = field(default_factory=Scores)
    recall: list[list[float]] = field(default_factory=list)
    jaccard: list[float] = field(default_factory=list)
    over_decoding: list[tuple[int, float | None, float]] = field(default_factory=list)
    draft_agrees: list[bool] = field(default_factory=list)
    recalled: list[tuple[int, int]] = field(default_factory=list)
    byte_share: list[float] = field(default_factory=list)
    total_share: list[float] = field(default_factory=list)

    def score(self, logits: Tensor, full: Tensor, following: list[int]) -> None:
        """logits (n, V) and the full cache's log-probabilities `full` (n, V) of the scored positions."""
        self.scores.add(logits, full, following)

    def weigh(self, draft: TieredCache | None, count: int) -> None:
        """Note the target's bytes in use, and with the draft's if the policy reads it, over a full cache's.

        count: scored positions of the block, for which bytes were recalled.
        """
        target, extra = self.sequence.target, draft.held_nbytes if draft and self.policy.reads_draft else 0
        full = max(target.full_nbytes, 1)  # 0 if every layer has a sliding window
        self.byte_share.append(target.nbytes / full)
        self.total_share.append((target.nbytes + extra) / full)
        moved = target.recall_bytes - sum(before for before, _ in self.recalled)
        self.recalled.append((moved, count * full))

    def commit(self, block: Block, text: list[int]) -> None:
        """All that was read is the text's own."""
        self.sequence.tokens = text[: block.position + block.count + 1]
        self.decoder.rollback(self.sequence, 0)

    def judge(self, block: Block, logits: Tensor) -> None:
        """Note which of the draft's proposals, behind the text's own tokens, are the policy's greedy ones; (n, V)."""
        if block.proposed:
            pairs = zip(block.drafts, logits.argmax(-1).tolist(), strict=False)
            self.draft_agrees += [draft == token for draft, token in pairs]

    def measure(self, queries: dict[int, Tensor], full: TieredCache, decoded: int) -> None:
        """Attention mass and overlap per layer, by the full cache's keys and its queries (1, H_q, n, D).

        decoded: tokens between the prompt and the block.
        """
        scaling, recall, jaccard = self.sequence.evidence.scaling, [], []
        for index, layer in enumerate(self.sequence.target.layers):
            if layer.window is not None:  # exact
                recall.append(1.0)
                continue
            keys = full.layers[index].keys
            recall.append(attention_recall(layer, queries[index], keys, scaling))
            if layer.num_kept:
                jaccard.append(jaccard_of_top(layer, queries[index], keys, scaling))
        self.recall.append(recall)
        self.jaccard += jaccard
        overlap = sum(jaccard) / len(jaccard) if jaccard else None
        self.over_decoding.append((decoded, overlap, sum(recall) / len(recall)))


def check_rows(rows: str, known: Collection[str] = BLOCK_ROWS) -> None:
    """UserError for a `task.rows` that is none of the known ones."""
    if rows not in known:
        raise UserError(f"task.rows={rows} is unknown; choose one of {', '.join(known)}.")


def advance(base: "Base", trials: list[Trial], text: list[int], block: Block) -> None:
    """One verify block of all trials, the first of which is the full cache's, in one pass of the target."""
    sequences, drafts = [trial.sequence for trial in trials], block.drafts
    for sequence in sequences:
        sequence.tokens = text[: block.position + 1]
    plan(base.decoder, trials, drafts)
    base.note_attended()
    narrow(base, sequences, block.count)
    calls = [base.decoder.verify_call(sequence, block.count) for sequence in sequences]
    calls[0].num_queries = block.count
    logits = base.decoder.verify_group(sequences, [drafts[: block.count - 1]] * len(trials), calls)
    full = logits[0].log_softmax(-1)
    following = text[block.position + 1 : block.position + 1 + block.count]
    for trial, own in zip(trials, logits, strict=True):
        trial.weigh(base.sequence.draft, block.count)
        trial.score(own, full, following)
        trial.judge(block, own)
        trial.commit(block, text)
    for trial in trials:
        if block.measure:
            trial.measure(calls[0].queries, sequences[0].target, block.position - base.context)
        trial.decoder.evict(trial.sequence)


def plan(decoder: Decoder, trials: list[Trial], drafts: list[int]) -> None:
    """Every trial's plan; those that look at the target's own attention look together."""
    looking = [trial for trial in trials if trial.policy.reads_target and trial.policy.due(trial.sequence.evicted_at)]
    looks = decoder.look([trial.sequence for trial in looking], [drafts] * len(looking)) if looking else []
    seen = dict(zip(map(id, looking), looks, strict=True))
    for trial in trials:
        if trial.decoder.controller is not None:
            trial.decoder.controller.decide_reads(trial.decoder, trial.sequence)
        trial.decoder.plan(trial.sequence, drafts, seen.get(id(trial)))


def narrow(base: "Base", sequences: list[Sequence], count: int) -> None:
    """After planning: the block's first `count` positions are all that is read and kept of it."""
    for sequence in sequences:
        for layer in sequence.target.layers:
            layer.narrow(count)
    if (oracle := base.sequence.evidence.oracle) is not None:
        oracle.block.narrow(count)


def matching_prefix(drafts: list[int], following: list[int]) -> int:
    """How many drafts are what the text says next."""
    pairs = zip(drafts, following, strict=False)
    return next((i for i, (draft, token) in enumerate(pairs) if draft != token), min(len(drafts), len(following)))


@dataclass
class Base:
    """What all trials of a text share: the draft with its cache and rows, and the target's cache of the prompt.

    logits: (V,) behind the prompt, which no policy has touched. view, attended: what drafting steps read of a long
    cache of the draft, and the rows that say so (`draft_view.py`).
    """

    spec: SpecSmallKV
    decoder: Decoder
    sequence: Sequence
    policies: list[Policy]
    logits: Tensor
    view: DraftView | None = None
    attended: Tensor | None = None

    @property
    def context(self) -> int:
        return self.sequence.target.seen

    @property
    def draft_share(self) -> float:
        """Bytes of the draft's cache over those of the target's full one; 0 without a draft."""
        draft, target = self.sequence.draft, self.sequence.target
        return draft.held_nbytes / draft.seen * target.seen / max(target.full_nbytes, 1) if draft else 0.0

    @property
    def needs_rows(self) -> bool:
        """Whether the draft reads the blocks. If all policies are static, blocks change nothing (invariant 2)."""
        return self.sequence.draft is not None and any(p.every_round or p.reads_draft for p in self.policies)

    def draft(self, text: list[int], position: int, gold: bool) -> list[int]:
        """Drafts for the block that begins with the text's token at `position`; their rows lie in the oracle.

        Blocks are cut where any of the policies evicts. Without need for rows they are the text's own tokens.
        """
        decoder, oracle, cache = self.decoder, self.sequence.evidence.oracle, self.sequence.draft
        room = [policy.evict_block - position % policy.evict_block - 1 for policy in self.policies]
        count = min(decoder.num_draft_tokens, len(text) - 2 - position, *room)
        following = text[position + 1 : position + 1 + count]
        if cache is None or not self.needs_rows:
            return following
        if oracle is not None:
            oracle.block.start(position, count + 1, known=False)
        call = AttentionCall(decoder.attention, rows=oracle.block if oracle else None)
        if gold:
            decoder.forward(decoder.draft_model, cache, [text[position], *following], call)
            return following
        view = self._view(cache) if count else None
        tokens = [text[position]]
        for _ in range(count):
            step = AttentionCall(decoder.attention, view=view) if view else call
            context, held = self.sequence.context_tokens, text[: position + 1]
            probabilities = decoder.draft_step(cache, tokens[-1:], step, context, held).softmax(-1)
            tokens.append(int(probabilities.argmax()))
            if oracle is not None:
                oracle.block.expect(float(probabilities.max()))
        if view:
            view.close()
        decoder.forward(decoder.draft_model, cache, tokens[cache.seen - position :], call, num_logits=0)
        return tokens[1:]

    def _view(self, cache: TieredCache) -> DraftView | None:
        """Opened by what the draft attended last, as in decoding; None where decoding would have none."""
        size, oracle = self._view_size, self.sequence.evidence.oracle
        if oracle is None or len(cache.budgeted) < len(cache.layers) or not is_viewed(size, cache.seen):
            return None
        self.view = self.view or DraftView(cache, size, self.decoder.num_draft_tokens + 2)
        self.view.open(oracle.attended() if self.attended is None else self.attended)
        return self.view

    @property
    def _view_size(self) -> int:
        return self.spec.controller.view_size if self.spec.controller else 0

    def note_attended(self) -> None:
        """The mean row (M, N) of a block, once trials have chosen by it."""
        oracle = self.sequence.evidence.oracle
        if oracle is not None and self._view_size:
            self.attended = oracle.block.mean(True, oracle.block.num_rows)

    def rewind(self, position: int) -> None:
        """The draft forgets what it read from `position` on."""
        if self.sequence.draft is not None:
            self.sequence.draft.rollback(max(0, self.sequence.draft.seen - position))


def prefill_once(spec: SpecSmallKV, policy: Policy, text: list[int], context: int, policies: list[Policy]) -> Base:
    """Read the prompt, the first `context` tokens, with both models; `policy` leaves what all policies need."""
    decoder = spec.decoder(policy=policy)
    sequence = decoder.start(text[:context], len(text) - context)
    if any(policy.reads_mass for policy in policies):
        sequence.evidence.mass = AttentionMass(sequence.target.layers[0].capacity)
    logits = decoder.prefill(sequence)
    decoder.prefill_draft(sequence)
    return Base(spec, decoder, sequence, policies, logits)


def open_trial(base: Base, policy: Policy, budget: float | None = None) -> Trial:
    """A trial with its own copy of the prompt's cache, while the draft's stands at the end of the prompt."""
    decoder = base.spec.decoder(policy=policy)
    sequence = decoder.branch(base.sequence)
    for layer in sequence.target.layers:
        layer.recall_bytes = 0  # a prompt read within the budget has recalled already
    if sequence.evidence.oracle is not None and base.sequence.evidence.oracle is not None:
        sequence.evidence.oracle.block = base.sequence.evidence.oracle.block  # the base drafts for all
    return Trial(policy, policy.kv_budget if budget is None else budget, decoder, sequence)


def read_on(
    base: Base, policies: list[Policy], text: list[int], gold: bool, progress: Callable[[int], None] | None = None
) -> list[Trial]:
    """A trial of each policy that has read the text to its end; `text` begins with the base's prompt."""
    return run_trials(
        base, [open_trial(base, policy) for policy in policies], text, gold, progress or (lambda _: None)
    )


def run_trials(
    base: Base, trials: list[Trial], text: list[int], gold: bool, progress: Callable[[int], None]
) -> list[Trial]:
    """Read the text to its end, block after block; `progress` hears how many positions each one scored.

    gold: a block's drafts are what the text says next, instead of what the draft proposes.
    """
    full = open_trial(base, load_policy("full"))
    position, number, proposed = base.context, 0, base.needs_rows and not gold
    while position < len(text) - 1:
        drafts = base.draft(text, position, gold)
        count = matching_prefix(drafts, text[position + 1 :]) + 1
        measure = number % MEASURE_EVERY == 0
        advance(base, [full, *trials], text, Block(position, drafts, count, proposed, measure))
        base.rewind(position + count)
        progress(count)
        position, number = position + count, number + 1
    base.rewind(base.context)
    base.attended = None
    return trials
