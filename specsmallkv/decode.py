"""The loop: prefill, then draft -> plan -> recall -> verify -> accept -> rollback -> evict, until done.

Pure token ids: it knows nothing about text, prompts or configuration (`generator.py` does). One sequence at a time.
The draft always runs before the target, so its attention rows for the very tokens to be verified are at hand.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import allocation, branching, drafting, foreseen, observation, planning, turns
from .attention import AttentionCall, use_tiered_attention
from .attention_form import head_dim, layer_windows, refuse_windows
from .backends import check_model, check_selection
from .controller import Controller, Decision
from .matching import HeadMap
from .own_attention import LastQueries
from .passes import Passes
from .policies import Policy
from .prefill import check_prefill, in_chunks, read_within_budget
from .sampling import Sampler
from .sequence import Round, Sequence, next_tokens
from .speculation import accept, match_vocabulary, propose
from .tensor_parallel import shard_of


class Decoder(Passes):
    """Decodes with one target, optionally a draft, under one policy.

    num_draft_tokens: 0 turns speculation off; the draft is then the oracle alone, if the policy reads it.
    draft: may be None when neither speculation nor the policy needs one. attention: a name in backends.BACKENDS.
    head_map: of this pair from other texts, for policies that read the draft. controller: decides, round by round, how
    many of the `num_draft_tokens` are drafted and whether the oracle reads; None: all, always.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        policy: Policy,
        num_draft_tokens: int,
        sampler: Sampler | None = None,
        attention: str = "sdpa",
        head_map: HeadMap | None = None,
        controller: Controller | None = None,
    ):
        assert draft is not None or not (num_draft_tokens or policy.reads_draft), "this needs a draft model"
        super().__init__(target, draft if num_draft_tokens or policy.reads_draft else None, attention)
        self.policy = policy.fitted(head_dim(target.config), target.dtype.itemsize)
        self.num_draft_tokens = num_draft_tokens
        self.shard = shard_of(target)
        self.sampler, self.head_map = sampler or Sampler(), self.shard.own(head_map)
        self.controller = controller
        check_selection(attention, policy.selection)
        check_prefill(policy, head_map)
        self.shard.check(policy, controller)
        self.device, self.vocab_size = target.device, target.config.vocab_size
        self.windows = layer_windows(target.config)
        allocation.check_budget(policy, self.windows)
        for model in filter(None, (target, self.draft_model)):
            check_model(attention, model.config)
            if policy.prefill_chunk:
                refuse_windows(f"policy.prefill_chunk={policy.prefill_chunk}", model.config)
            use_tiered_attention(model)

    # --- the loop --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        stop_ids: set[int] | None = None,
        seed: int = 0,
        compress_after: int | None = None,
        continues: Sequence | None = None,
    ) -> Iterator[tuple[Round, Sequence]]:
        """Yields rounds until `max_new_tokens` or a stop id; the first round is the prompt's next token.

        compress_after: only so many tokens are the prompt that is compressed; the others arrive as a later turn.
        continues: a sequence that the prompt begins with, its last token perhaps excepted; its caches are taken over.
        """
        if continues is not None:
            sequence = self.resume(continues, prompt, max_new_tokens)
            logits = self.extend(sequence, prompt[sequence.target.seen :])
        else:
            sequence, logits = self.begin(prompt, max_new_tokens, compress_after)
        yield from self.decode(sequence, logits, stop_ids, seed)

    @torch.inference_mode()
    def decode(
        self, sequence: Sequence, logits: Tensor, stop_ids: set[int] | None = None, seed: int = 0
    ) -> Iterator[tuple[Round, Sequence]]:
        """Rounds from the logits (V,) of the last known token on."""
        generator, stop_ids = torch.Generator(self.device).manual_seed(seed), stop_ids or set()
        yield self.first(sequence, logits, generator), sequence
        while len(sequence.tokens) < sequence.limit and sequence.tokens[-1] not in stop_ids:
            self.settle(sequence)
            yield self.round(sequence, generator, stop_ids), sequence

    def first(self, sequence: Sequence, logits: Tensor, generator: torch.Generator) -> Round:
        """The token that follows the known ones, by their logits (V,) alone."""
        token, _ = propose(logits, self.sampler, generator)
        (token,) = self.shard.first([token])
        sequence.tokens.append(token)
        sequence.logits = logits.unsqueeze(0)
        return Round([token])

    def round(self, sequence: Sequence, generator: torch.Generator, stop_ids: set[int]) -> Round:
        """One verify pass with everything around it."""
        counters = sequence.counters
        self.decide(sequence)
        with counters.timed("draft"):
            drafts, probabilities = self.draft(sequence, generator)
        with counters.timed("plan"):
            self.plan(sequence, drafts)
        with counters.timed("verify"):
            logits = self.verify(sequence, drafts)
            accepted, following = accept(drafts, probabilities, logits, self.sampler, generator)
            accepted, following = self.shard.first([accepted, following])
        with counters.timed("evict"):
            return self.conclude(sequence, drafts, accepted, following, stop_ids)

    # --- its verbs -------------------------------------------------------------------------------------------------

    def begin(
        self, prompt: list[int], max_new_tokens: int, compress_after: int | None = None
    ) -> tuple[Sequence, Tensor]:
        """A new sequence that has read its prompt, and the logits (V,) of the last token."""
        sequence = self.start(prompt, max_new_tokens)
        sequence.tokens, turn = prompt[:compress_after], prompt[compress_after:] if compress_after else []
        logits = self.prefill(sequence)
        return sequence, self.extend(sequence, turn) if turn else logits

    def start(self, prompt: list[int], max_new_tokens: int) -> Sequence:
        """Caches and scratch for one sequence (`allocation.py`)."""
        return allocation.start(self, prompt, max_new_tokens)

    def resume(self, sequence: Sequence, prompt: list[int], max_new_tokens: int) -> Sequence:
        """A sequence at rest, with room for a longer prompt that begins with its tokens; counters start anew."""
        return allocation.resume(self, sequence, prompt, max_new_tokens)

    def branch(self, base: Sequence) -> Sequence:
        """Another sequence after the prompt that `base` has read, under this decoder's policy (`branching.py`)."""
        return branching.branch(self, base)

    def prefill(self, sequence: Sequence) -> Tensor:
        """Target reads what it has not yet read of the prompt; logits (V,) of its last position.

        The observation window is read apart.
        """
        prompt = sequence.tokens
        if in_chunks(self.policy, len(prompt)):
            return read_within_budget(self, sequence)
        window = min(self.policy.num_observed, len(prompt)) if self.policy.due(len(prompt)) else 0
        unread = prompt[sequence.target.seen : len(prompt) - window]
        logits = self.feed(self.target, sequence.target, unread, sequence.evidence.mass)
        if window:
            logits = observation.observe_target(self, sequence, prompt[-window:])
        sequence.counters.see_prefill(sequence.target)
        return logits

    def prefill_draft(self, sequence: Sequence) -> None:
        """Draft reads what it has not yet read of the prompt, i.e. of all tokens that the target's cache holds."""
        if self.draft_model is not None and sequence.draft is not None:
            window = len(sequence.evidence.queries[0][0, 0]) if sequence.evidence.queries else 0
            committed = sequence.tokens[: sequence.target.seen]
            self.feed(self.draft_model, sequence.draft, committed[sequence.draft.seen : len(committed) - window])
            if window:
                observation.observe_draft(self, sequence, committed[-window:])

    def settle(self, sequence: Sequence) -> None:
        """Once a sequence, before anything follows its prompt: the draft reads it, static policies compress it."""
        if not sequence.settled:
            with sequence.counters.timed("prefill_draft"):
                self.prefill_draft(sequence)
                self.foresee(sequence)
                sequence.evidence.foreseen.clear()  # they are in the oracle's sum; only branches ask for them again
                self.evict(sequence, after_prefill=True)
            sequence.settled = True

    def foresee(self, sequence: Sequence) -> None:
        """The draft writes some tokens behind the prompt and forgets them; their rows stay (`foreseen.py`)."""
        foreseen.foresee(self, sequence)

    def extend(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        """Read further known tokens, at least one: logits (V,) of the last one (`turns.py`)."""
        return turns.extend(self, sequence, tokens)

    def read(self, sequence: Sequence, following: list[int]) -> None:
        """What `draft` does, for known tokens: the draft reads the last token and those that follow it."""
        if sequence.draft is not None:
            oracle = sequence.evidence.oracle
            if oracle is not None:
                oracle.block.start(sequence.target.seen, len(following) + 1)
            call = AttentionCall(self.attention, rows=oracle.block if oracle else None)
            tokens = sequence.tokens[sequence.draft.seen :] + following
            self.forward(self.draft_model, sequence.draft, tokens, call, num_logits=0)

    def decide(self, sequence: Sequence) -> None:
        """What the coming round does, if it is not what the decoder is set to."""
        waited = sequence.waits
        if self.controller is not None:
            self.controller.decide(self, sequence)
        if self.reads_later(sequence):
            sequence.decision = Decision(0, reads=False)
        elif waited and sequence.decision is not None:
            sequence.decision = sequence.decision._replace(catches_up=True)

    def reads_later(self, sequence: Sequence) -> bool:
        """Whether the draft waits in the coming round: it can, and nobody wants its drafts."""
        decision = sequence.decision if self.controller is not None else None
        drafts = self.num_draft_tokens if decision is None else decision.num_draft_tokens
        return not drafts and self.can_wait(sequence)

    def can_wait(self, sequence: Sequence) -> bool:
        """Whether the draft's rows only count at the next eviction."""
        oracle, draft = sequence.evidence.oracle, sequence.draft
        if oracle is None or draft is None or self.policy.every_round:
            return False
        return len(draft.budgeted) == len(draft.layers) and not self.policy.compensates(sequence.evidence)

    def draft(self, sequence: Sequence, generator: torch.Generator) -> tuple[list[int], list[Tensor | None]]:
        """Drafts with their distributions; one pass more if the policy reads rows that no drafting step records."""
        drafts: list[int] = []
        probabilities: list[Tensor | None] = []
        count = drafting.begin(self, sequence)
        pending = sequence.tokens[sequence.draft.seen :] if sequence.draft else []
        for step in range(count):
            call = drafting.step_call(self, sequence, len(pending))
            logits = self.draft_step(sequence.draft, pending, call, sequence.context_tokens, sequence.tokens)
            token, distribution = self.propose(sequence, logits, generator)
            if step == 0:
                drafting.send_ahead(self, sequence)
                drafting.view_rest(self, sequence, count)
            drafts.append(token)
            probabilities.append(distribution)
            pending = [token]
        if drafting.lacks_rows(sequence, count):
            tokens = drafting.unread(sequence, drafts)
            call = drafting.step_call(self, sequence, len(tokens))
            self.forward(self.draft_model, sequence.draft, tokens, call, num_logits=0)
        return drafts, probabilities

    def draft_group(self, sequences: list[Sequence], tokens: list[list[int]], logits: str = "last") -> list[Tensor]:
        """One pass of the draft over what each of several sequences has pending (`drafting.py`)."""
        return drafting.step_group(self, sequences, tokens, logits)

    def propose(self, sequence: Sequence, logits: Tensor, generator: torch.Generator) -> tuple[int, Tensor | None]:
        """The next draft from the draft's logits (V,), its distribution, and its chance noted for the oracle."""
        token, distribution = propose(match_vocabulary(logits, self.vocab_size), self.sampler, generator)
        (token,) = self.shard.first([token])
        if sequence.reading is not None:
            chances = logits.softmax(-1) if distribution is None else distribution
            sequence.reading.block.expect(float(chances[token]))
        return token, distribution

    def plan(self, sequence: Sequence, drafts: list[int], looked: Tensor | None = None) -> None:
        """What the coming verify pass reads (`planning.py`)."""
        planning.plan(self, sequence, drafts, looked)

    def look(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[Tensor]:
        """The target's true attention of the coming blocks (`planning.py`). Analysis only."""
        return planning.look(self, sequences, drafts)

    def verify(self, sequence: Sequence, drafts: list[int]) -> Tensor:
        """One target pass over the last token and the drafts: logits (k + 1, V)."""
        (tokens,) = next_tokens([sequence], [drafts])
        call = self.verify_call(sequence, len(tokens))
        logits = sequence.logits = self.forward(self.target, sequence.target, tokens, call, len(tokens))
        self._verified(sequence, call)
        return logits

    def verify_group(
        self, sequences: list[Sequence], drafts: list[list[int]], calls: list[AttentionCall] | None = None
    ) -> list[Tensor]:
        """`verify` for several sequences in one target pass, with any numbers of drafts: logits (k + 1, V) of each.

        calls: what `verify_call` gives for each sequence, if they are to keep more than it asks for.
        """
        blocks = next_tokens(sequences, drafts)
        calls = calls or [self.verify_call(*pair) for pair in zip(sequences, map(len, blocks), strict=True)]
        logits = self.forward_group(self.target, [sequence.target for sequence in sequences], blocks, calls)
        for sequence, call in zip(sequences, calls, strict=True):
            self._verified(sequence, call)
        return logits

    def verify_call(self, sequence: Sequence, num_tokens: int) -> AttentionCall:
        asked = sequence.evidence.last is not None or sequence.evidence.mass is not None
        return AttentionCall(self.attention, num_queries=num_tokens if asked else 0)

    def _verified(self, sequence: Sequence, call: AttentionCall) -> None:
        if sequence.evidence.mass:
            sequence.evidence.mass.pending = call.queries
        if sequence.evidence.last is not None:
            queries = {index: call.queries[index] for index in self.budgeted}
            sequence.evidence.last = LastQueries(queries, sequence.target.seen - call.num_queries)
        sequence.counters.see(sequence.target)

    def conclude(
        self, sequence: Sequence, drafts: list[int], accepted: int, following: int, stop_ids: set[int]
    ) -> Round:
        """After the verdict on the drafts: the tokens it emits, both caches without the others, and eviction."""
        emitted = until_stop([*drafts[:accepted], following], stop_ids)
        sequence.tokens += emitted
        self.rollback(sequence, len(drafts) + 1 - len(emitted))
        self.evict(sequence)
        sequence.counters.add(len(emitted), len(drafts), accepted)
        sequence.history.note(len(drafts), accepted)
        return Round(emitted, len(drafts), accepted, drafts)

    def rollback(self, sequence: Sequence, rejected: int) -> None:
        """Drop rejected tokens from both caches; only accepted rows enter the oracle's interval and the mass."""
        oracle, mass = sequence.reading, sequence.evidence.mass
        if oracle is not None:
            oracle.commit(oracle.block.num_rows - rejected)
        sequence.target.rollback(rejected)
        if mass:
            mass.commit(sequence.target.layers)
        sequence.close_view()
        if sequence.draft is not None:
            sequence.draft.rollback(max(0, sequence.draft.seen - sequence.target.seen))

    def evict(self, sequence: Sequence, after_prefill: bool = False) -> None:
        """Committed tokens leave the recent window in blocks: after prefill, then at multiples of `evict_block`."""
        seen, evidence = sequence.target.seen, sequence.evidence
        if not after_prefill and seen % self.policy.evict_block:
            return
        sequence.evicted_at = seen
        if evidence.mass:
            evidence.mass.count(sequence.target.layers, evidence.scaling)
        if not self.policy.due(seen):
            return
        drafting.catch_up(self, sequence)
        observation.observe_if_needed(self, sequence)
        if not self.policy.every_round:  # else memory moves in `plan`, with the next block's rows
            if evidence.oracle is not None:
                evidence.saliency = evidence.oracle.interval_saliency(seen)
                evidence.oracle.refresh()
            planning.retain(self, sequence, self.num_waiting)
        if not self.policy.keeps_window:
            evidence.forget_window(self.policy.every_round)

    # --- sizes -----------------------------------------------------------------------------------------------------

    @property
    def budgeted(self) -> list[int]:
        """The target's layers that a budget is about: all but those with a sliding window."""
        return [index for index, window in enumerate(self.windows) if window is None]

    @property
    def num_waiting(self) -> int:
        """Most tokens that are appended between two evictions, a verify block included."""
        return max(self.policy.evict_block + self.num_draft_tokens + 1, turns.most_at_once(self))

    def turn_size(self, sequence: Sequence) -> int:
        """Of a later turn: a pass reads no further than the next eviction event."""
        return min(turns.most_at_once(self), self.policy.evict_block - sequence.target.seen % self.policy.evict_block)


def until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Tokens up to and including the first stop id."""
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens
