"""The loop: prefill, then draft -> plan -> recall -> verify -> accept -> rollback -> evict, until done.

Pure token ids: it knows nothing about text, prompts or configuration (`generator.py` does). One sequence at a time.
The draft always runs before the target, so its attention rows for the very tokens to be verified are at hand.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import drafting, planning
from .attention import AttentionCall, AttentionMass, AttentionRows, use_tiered_attention
from .attention_form import attention_scaling, layer_windows, refuse_windows
from .backends import check_model, check_selection
from .cache import TieredCache
from .cache_group import CacheGroup
from .controller import Controller, Decision
from .errors import UserError
from .matching import HeadMap, Prior
from .oracle import AttentionOracle
from .own_attention import LastQueries
from .policies import Evidence, Policy
from .prefill import branch_within_budget, check_prefill, in_chunks, read_within_budget, summed_rows
from .sampling import Sampler
from .sequence import Counters, Round, Sequence
from .speculation import accept, match_vocabulary, propose
from .tensor_parallel import shard_of
from .trimmed_head import ContextTokens, context_logits, context_tokens

OBSERVED_CHUNK = 32  # rows of the observation window at a time; bounds scratch, not the result
PREFILL_CHUNK = 2048  # tokens per prefill pass; bounds the activations, not the result
TURN_CHUNK = 32  # the same for known tokens that static policies read; bounds the draft's rows
TURN_BLOCK = 4  # least number of known tokens that share one set; a pass each would cost as much as decoding them


class Decoder:
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
        self.target, self.policy, self.num_draft_tokens = target, policy, num_draft_tokens
        self.draft_model = draft if num_draft_tokens or policy.reads_draft else None
        self.shard = shard_of(target)
        self.sampler, self.attention, self.head_map = sampler or Sampler(), attention, self.shard.own(head_map)
        self.controller = controller
        check_selection(attention, policy.selection)
        check_prefill(policy, head_map)
        self.shard.check(policy, controller)
        self.device, self.vocab_size = target.device, target.config.vocab_size
        self.windows = layer_windows(target.config)
        check_budget(policy, self.windows)
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
        """Caches and scratch for one sequence."""
        limit, num_layers = len(prompt) + max_new_tokens, self.target.config.num_hidden_layers
        room, resident = self._room(limit, max_new_tokens)
        target = TieredCache(num_layers, limit + room, resident, self.windows, residency=self.policy.residency)
        draft = full_cache(self.draft_model, limit + room) if self.draft_model else None
        evidence = Evidence(attention_scaling(self.target.config), self.budgeted, self._oracle(room, limit + room))
        evidence.mass = AttentionMass(limit + room) if self.policy.reads_mass else None
        context = context_tokens(self.draft_model)
        return Sequence(list(prompt), limit, target, draft, evidence, len(prompt), context_tokens=context)

    def resume(self, sequence: Sequence, prompt: list[int], max_new_tokens: int) -> Sequence:
        """A sequence at rest, with room for a longer prompt that begins with its tokens; counters start anew."""
        limit = len(prompt) + max_new_tokens
        room, resident = self._room(limit, max_new_tokens)
        sequence.target.grow(limit + room, resident)
        if sequence.draft is not None:
            sequence.draft.grow(limit + room)
        if sequence.evidence.oracle is not None:
            sequence.evidence.oracle.grow(self.new_rows(room, sequence.target.layers[0].capacity))
        if sequence.evidence.mass is not None:
            sequence.evidence.mass.grow(limit + room)
        for layer in sequence.target.layers:
            layer.recall_bytes = 0
        sequence.tokens, sequence.last_row = sequence.tokens[: sequence.target.seen], None
        sequence.limit, sequence.counters = limit, Counters()
        return sequence

    def branch(self, base: Sequence) -> Sequence:
        """Another sequence after the prompt that `base` has read, compressed by this decoder's policy.

        The target's cache is a copy; the draft's cache, its rows and the fit are the base's own. The draft's cache
        must be rolled back to the prompt before another branch uses it. The base's observation window must be as wide
        as this policy's; if it is wider, or has other sinks, the draft reads its end again for a fit of its own.
        """
        if in_chunks(self.policy, len(base.tokens)):
            return branch_within_budget(self, base)
        sequence = self.start(base.tokens, base.limit - len(base.tokens))
        base.target.copy_to(sequence.target)
        sequence.counters.see_prefill(sequence.target)
        own, oracle = sequence.evidence.oracle, base.evidence.oracle
        window = min(self.policy.num_observed, base.target.seen)
        sequence.evidence = base.evidence.fork(self.policy.reads_mass)
        queries = base.evidence.queries
        sequence.evidence.queries = {index: x[:, :, -window:] for index, x in queries.items()}
        if own is not None and oracle is not None and oracle.head_map is not None:
            if queries[0].shape[2] == window and oracle.num_sinks == self.policy.num_sink_tokens:
                own = oracle.share(self.policy.matching, own.prior, self.policy.lookahead)
            else:
                own.block = oracle.block
                self._observe_end(base, own, sequence.evidence.queries)
        sequence.evidence.oracle = own
        sequence.draft, sequence.settled = base.draft if self.draft_model else None, True
        self.foresee(sequence)
        self.evict(sequence, after_prefill=True)
        return sequence

    def _observe_end(self, base: Sequence, oracle: AttentionOracle, queries: dict[int, Tensor]) -> None:
        """Fit a branch's oracle on the end of the base's window: as many tokens as there are queries."""
        assert base.draft is not None
        window = base.tokens[: base.target.seen][-queries[0].shape[2] :]
        base.draft.rollback(len(window))
        evidence = replace(base.evidence, oracle=oracle, queries=queries)
        self.observe_draft(replace(base, evidence=evidence), window)

    def prefill(self, sequence: Sequence) -> Tensor:
        """Target reads what it has not yet read of the prompt; logits (V,) of its last position.

        The observation window is read apart.
        """
        prompt = sequence.tokens
        if in_chunks(self.policy, len(prompt)):
            return read_within_budget(self, sequence)
        window = min(self.policy.num_observed, len(prompt)) if self.policy.due(len(prompt)) else 0
        unread = prompt[sequence.target.seen : len(prompt) - window]
        logits = self._feed(self.target, sequence.target, unread, sequence.evidence.mass)
        if window:
            logits = self.observe_target(sequence, prompt[-window:])
        sequence.counters.see_prefill(sequence.target)
        return logits

    def prefill_draft(self, sequence: Sequence) -> None:
        """Draft reads what it has not yet read of the prompt, i.e. of all tokens that the target's cache holds."""
        if self.draft_model is not None and sequence.draft is not None:
            window = len(sequence.evidence.queries[0][0, 0]) if sequence.evidence.queries else 0
            committed = sequence.tokens[: sequence.target.seen]
            self._feed(self.draft_model, sequence.draft, committed[sequence.draft.seen : len(committed) - window])
            if window:
                self.observe_draft(sequence, committed[-window:])

    def settle(self, sequence: Sequence) -> None:
        """Once a sequence, before anything follows its prompt: the draft reads it, static policies compress it."""
        if not sequence.settled:
            with sequence.counters.timed("prefill_draft"):
                self.prefill_draft(sequence)
                self.foresee(sequence)
                self.evict(sequence, after_prefill=True)
            sequence.settled = True

    def foresee(self, sequence: Sequence) -> None:
        """The draft writes some tokens behind the prompt and forgets them; their rows count as accepted ones.

        They follow from the prompt alone, so that what is kept does not depend on speculation.
        """
        oracle, draft, count = sequence.evidence.oracle, sequence.draft, self.policy.num_foreseen_tokens
        if oracle is None or oracle.head_map is None or draft is None or not count:
            return
        foreseen = sequence.evidence.foreseen
        if count not in foreseen:
            foreseen[count] = self._foreseen_rows(draft, sequence, count)
        oracle.add(foreseen[count], count)

    def _foreseen_rows(self, draft: TieredCache, sequence: Sequence, count: int) -> Tensor:
        """Sum (M, N) of the draft's rows for `count` tokens from the last one it read on."""
        seen, rows = draft.seen, self.new_rows(1, draft.seen + count)
        token, held = sequence.tokens[seen - 1], sequence.tokens[:seen]
        total = torch.zeros_like(rows.buffer[:, 0, :seen])
        draft.grow(seen + count)
        draft.rollback(1)
        for _ in range(count):
            rows.start(draft.seen, 1)
            call = AttentionCall(self.attention, rows=rows)
            logits = self.draft_step(draft, [token], call, sequence.context_tokens, held)
            total += rows.buffer[:, 0, :seen]
            (token,) = self.shard.first([int(logits.argmax())])
        draft.rollback(draft.seen - seen)
        return total

    def extend(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        """Read further known tokens, at least one, through the compressed cache: logits (V,) of the last one.

        A block of known tokens is a verify pass that accepts everything: the draft reads it first and its rows steer
        the target. Static policies evict at the same lengths, so for them the cuts between blocks change nothing.
        """
        self.settle(sequence)
        self.catch_up(sequence)
        with sequence.counters.timed("extend"):
            if not self.policy.evicts:
                return self._extend_full(sequence, tokens)
            oracle = sequence.evidence.oracle
            own = oracle.block if oracle else None
            if oracle:  # rows of a turn are scratch for that turn alone
                oracle.block = self.new_rows(self._turn_limit, len(sequence.tokens) + len(tokens))
            while tokens:
                count = self._turn_size(sequence)
                logits = self._extend_block(sequence, tokens[:count])
                tokens = tokens[count:]
            if oracle and own:
                oracle.block = own
        return logits

    def _extend_full(self, sequence: Sequence, tokens: list[int]) -> Tensor:
        sequence.tokens += tokens
        if sequence.draft is not None and self.draft_model is not None:
            self._feed(self.draft_model, sequence.draft, sequence.tokens[sequence.draft.seen :])
        return self._feed(self.target, sequence.target, tokens)

    def _extend_block(self, sequence: Sequence, block: list[int]) -> Tensor:
        """One round whose drafts are known to be right; logits (V,) of its last token."""
        sequence.decision = None
        sequence.tokens.append(block[0])
        self.read(sequence, block[1:])
        self.plan(sequence, block[1:])
        logits = self.verify(sequence, block[1:])[-1]
        sequence.tokens += block[1:]
        self.rollback(sequence, 0)
        self.evict(sequence)
        return logits

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
        if self.controller is not None:
            self.controller.decide(self, sequence)
        if self.reads_later(sequence):
            sequence.decision = Decision(0, reads=False)

    def reads_later(self, sequence: Sequence) -> bool:
        """Whether the draft can wait: its rows only count at the next eviction, and nobody wants its drafts."""
        oracle, draft = sequence.evidence.oracle, sequence.draft
        if oracle is None or draft is None or self.num_draft_tokens or self.policy.every_round:
            return False
        return len(draft.budgeted) == len(draft.layers) and not self.policy.compensates(sequence.evidence)

    def catch_up(self, sequence: Sequence) -> None:
        """The draft reads, in one pass, the committed tokens it waited with; their rows count as accepted ones."""
        draft, oracle = sequence.draft, sequence.evidence.oracle
        if draft is None or oracle is None or self.policy.every_round:
            return
        unread = sequence.tokens[draft.seen : sequence.target.seen]
        for start in range(0, len(unread), PREFILL_CHUNK):
            chunk = unread[start : start + PREFILL_CHUNK]
            sequence.counters.catch_ups += 1
            sequence.counters.see_draft(draft.held_nbytes, len(chunk))
            oracle.add(summed_rows(self, draft, chunk), len(chunk))

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

    def draft_step(
        self,
        cache: TieredCache | None,
        pending: list[int],
        call: AttentionCall,
        context: ContextTokens | None,
        held: list[int],
    ) -> Tensor:
        """One pass of the draft: logits (V,) behind the last pending token; held: what `context` is to follow."""
        if context is None:
            return self.forward(self.draft_model, cache, pending, call)[-1]
        assert self.draft_model is not None
        hidden = self.forward(self.draft_model, cache, pending, call, num_logits=0)[-1:]
        return context_logits(self.draft_model, hidden, [context], [held])[0]

    def draft_group(self, sequences: list[Sequence], tokens: list[list[int]], logits: str = "last") -> list[Tensor]:
        """One pass of the draft over what each of several sequences has pending: logits (V,) behind the last token.

        logits: "none" where the rows alone are wanted.
        """
        caches = [sequence.draft for sequence in sequences if sequence.draft is not None]
        calls = [drafting.step_call(self, *pair) for pair in zip(sequences, map(len, tokens), strict=True)]
        contexts = [sequence.context_tokens for sequence in sequences if sequence.context_tokens]
        if logits == "none" or not contexts:
            return [own[-1] for own in self.forward_group(self.draft_model, caches, tokens, calls, logits)]
        assert self.draft_model is not None
        hidden = [own[-1] for own in self.forward_group(self.draft_model, caches, tokens, calls, "none")]
        held = [sequence.tokens for sequence in sequences]
        return list(context_logits(self.draft_model, torch.stack(hidden), contexts, held))

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
        """The target's true attention of the coming blocks, from every key: saliency (L, H_kv, N). Analysis only."""
        blocks, config = next_tokens(sequences, drafts), self.target.config
        num_layers, num_heads, size = config.num_hidden_layers, config.num_attention_heads, len(blocks[0])
        seen = [sequence.target.seen for sequence in sequences]
        rows = [AttentionRows(num_layers, num_heads, size, start + size, self.device) for start in seen]
        for own, start in zip(rows, seen, strict=True):
            own.start(start, size)
        calls = [AttentionCall(self.attention, rows=own, everything=True) for own in rows]
        self.forward_group(self.target, [sequence.target for sequence in sequences], blocks, calls, logits="none")
        for sequence in sequences:
            sequence.target.rollback(size)
        means = [own.values.mean(1) for own in rows]
        return [x.view(num_layers, config.num_key_value_heads, -1, x.shape[1]).mean(2) for x in means]

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
        asked = self.policy.reads_last or sequence.evidence.mass is not None
        return AttentionCall(self.attention, num_queries=num_tokens if asked else 0)

    def _verified(self, sequence: Sequence, call: AttentionCall) -> None:
        if sequence.evidence.mass:
            sequence.evidence.mass.pending = call.queries
        if self.policy.reads_last:
            sequence.evidence.last = LastQueries(call.queries, sequence.target.seen - call.num_queries)
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
        self.catch_up(sequence)
        self._observe_if_needed(sequence)
        if self.policy.every_round:
            return  # moves memory in `plan`, with the next block's rows
        if evidence.oracle is not None:
            evidence.saliency = evidence.oracle.interval_saliency(seen)
            evidence.oracle.refresh()
        planning.retain(self, sequence, self.num_waiting)

    # --- the observation window ------------------------------------------------------------------------------------

    def observe_target(self, sequence: Sequence, window: list[int]) -> Tensor:
        """Feed the window to the target and keep its queries; logits (V,) of the last position."""
        call = AttentionCall(self.attention, num_queries=len(window), mass=sequence.evidence.mass)
        logits = self.forward(self.target, sequence.target, window, call)
        sequence.evidence.queries = call.queries
        return logits[-1]

    def observe_draft(self, sequence: Sequence, window: list[int]) -> None:
        """Feed the window to the draft, recording its rows, and fit the head map."""
        assert self.draft_model is not None and sequence.draft is not None
        oracle, evidence = sequence.evidence.oracle, sequence.evidence
        if oracle is None:
            self._feed(self.draft_model, sequence.draft, window)
            return
        for start in range(0, len(window), OBSERVED_CHUNK):
            chunk = window[start : start + OBSERVED_CHUNK]
            end = sequence.draft.seen + len(chunk)
            rows = self.new_rows(len(chunk), end)
            rows.start(end - len(chunk), len(chunk))
            self.forward(
                self.draft_model, sequence.draft, chunk, AttentionCall(self.attention, rows=rows), num_logits=0
            )
            queries = {i: x[:, :, start : start + len(chunk)] for i, x in evidence.queries.items()}
            oracle.observe(rows.values, queries, sequence.target, evidence.scaling, self.policy.num_sink_tokens)
        oracle.fit(self.policy.matching)

    def _observe_if_needed(self, sequence: Sequence) -> None:
        """A prompt too short to evict left no window: read the last tokens once more, now that it matters."""
        if sequence.evidence.queries:
            return
        window = sequence.tokens[: sequence.target.seen][-self.policy.num_observed :]
        start = sequence.target.seen - len(window)
        sequence.target.rollback(len(window))
        self.observe_target(sequence, window)
        if sequence.draft is not None and sequence.evidence.oracle is not None:
            sequence.draft.rollback(sequence.draft.seen - start)
            self.observe_draft(sequence, window)

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _room(self, limit: int, max_new_tokens: int) -> tuple[int, list[int] | None]:
        """Tokens of one verify block, and each layer's resident slots once the cache is compressed (None: never)."""
        room = min(self.num_draft_tokens, max_new_tokens) + 1
        if not self.policy.evicts:
            return room, None
        places = {layer: place for place, layer in enumerate(self.budgeted)}
        sizes = [
            self.policy.tiers(limit, places[index], len(places)).critical
            if window is None
            else window + self.num_waiting
            for index, window in enumerate(self.windows)
        ]
        return room, [min(count, limit) + self.num_waiting for count in sizes]

    @property
    def budgeted(self) -> list[int]:
        """The target's layers that a budget is about: all but those with a sliding window."""
        return [index for index, window in enumerate(self.windows) if window is None]

    @property
    def num_waiting(self) -> int:
        """Most tokens that are appended between two evictions, a verify block included."""
        return max(self.policy.evict_block + self.num_draft_tokens + 1, self._turn_limit)

    @property
    def _turn_limit(self) -> int:
        """Most known tokens in one pass: as many as share one set, or for static policies a chunk."""
        lookahead = max(self.num_draft_tokens + 1, TURN_BLOCK)
        return lookahead if self.policy.every_round else min(TURN_CHUNK, self.policy.evict_block)

    def _turn_size(self, sequence: Sequence) -> int:
        """A pass over known tokens reads no further than the next eviction event."""
        return min(self._turn_limit, self.policy.evict_block - sequence.target.seen % self.policy.evict_block)

    def new_rows(self, num_rows: int, length: int) -> AttentionRows:
        assert self.draft_model is not None
        config = self.draft_model.config
        return AttentionRows(
            config.num_hidden_layers, config.num_attention_heads, num_rows, length, self.draft_model.device
        )

    def _oracle(self, num_rows: int, capacity: int) -> AttentionOracle | None:
        if not self.policy.reads_draft:
            return None
        rows = self.new_rows(num_rows, capacity)
        saved = self.head_map
        prior = Prior(saved, self.policy.map_rows) if saved is not None and self.policy.map_rows else None
        num_heads = self.shard.heads(self.target.config.num_key_value_heads)
        return AttentionOracle(rows, num_heads, prior, self.policy.lookahead, self.shard)

    def _feed(
        self, model: PreTrainedModel, cache: TieredCache, tokens: list[int], mass: AttentionMass | None = None
    ) -> Tensor:
        """Process tokens in chunks; logits (V,) of the last one (empty if there are none)."""
        logits = torch.empty(0)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            logits = self.forward(model, cache, chunk, AttentionCall(self.attention, mass=mass))[-1]
        return logits

    def forward(
        self,
        model: PreTrainedModel | None,
        cache: TieredCache | None,
        tokens: list[int],
        call: AttentionCall,
        num_logits: int = 1,
    ) -> Tensor:
        """Float32 logits (num_logits, V) of the last positions; 0: hidden states (q, d), no output layer."""
        assert model is not None and cache is not None
        ids = torch.tensor([tokens], device=model.device)
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "attention_call": call}
        if num_logits == 0:
            return model.base_model(input_ids=ids, **options)[0][0].float()
        return model(input_ids=ids, logits_to_keep=num_logits, **options).logits[0].float()

    def forward_group(
        self,
        model: PreTrainedModel | None,
        caches: list[TieredCache],
        tokens: list[list[int]],
        calls: list[AttentionCall],
        logits: str = "all",
    ) -> list[Tensor]:
        """One model over some tokens of each of several sequences, packed end to end: float32 logits of each.

        logits: "all" positions, (q, V) a row, the "last" of every row, (1, V), or "none", which leaves the output
        layer out and gives hidden states.
        """
        assert model is not None
        counts = [len(own) for own in tokens]
        group = CacheGroup(caches, counts)
        last = torch.tensor(counts, device=model.device).cumsum(0) - 1
        output = (model.base_model if logits == "none" else model)(
            input_ids=torch.tensor([list(chain.from_iterable(tokens))], device=model.device),
            position_ids=group.positions(model.device),
            past_key_values=group,
            use_cache=True,
            attention_call=calls,
            **({"logits_to_keep": last} if logits == "last" else {}),
        )
        return list(output[0][0].float().split([1] * len(counts) if logits == "last" else counts))


def next_tokens(sequences: list[Sequence], drafts: list[list[int]]) -> list[list[int]]:
    """What a verify pass reads of each sequence: the last token and its drafts."""
    return [[sequence.tokens[-1], *own] for sequence, own in zip(sequences, drafts, strict=True)]


def full_cache(model: PreTrainedModel, capacity: int) -> TieredCache:
    """A cache that never evicts, e.g. the draft's."""
    return TieredCache(model.config.num_hidden_layers, capacity, windows=layer_windows(model.config))


def check_budget(policy: Policy, windows: list[int | None]) -> None:
    """UserError where a policy would compress nothing, since the model keeps a sliding window in every layer."""
    if policy.evicts and all(windows):
        raise UserError(
            f"policy={policy.name} with kv_budget={policy.kv_budget} compresses nothing: all {len(windows)} layers of "
            f"the target see a sliding window of {windows[0]} tokens, which stays exact; use policy=full."
        )


def until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Tokens up to and including the first stop id."""
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens
