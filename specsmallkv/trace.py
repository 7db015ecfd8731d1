"""What a run did, round by round: an observer beside the loop, for `trace.jsonl` and for the run's page (`page.py`).

`decode.py` does not know it: a `Generation` shows it every round when it is complete. What the caches hold then is
what that verify pass read, if the policy chooses anew each round, and what the next one reads, if it is static.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .attention import AttentionCall, AttentionRows
from .cache import TieredCache
from .sampling import Sampler

if TYPE_CHECKING:
    from .decode import Decoder
    from .generator import SpecSmallKV
    from .sequence import Round, Sequence

NUM_ALTERNATIVES = 4  # most probable tokens kept for each emitted one
SAMPLED_EVERY = 4  # attention is compared in rounds 1, 4, 16, 64, ...
NUM_SAMPLED_HEADS = 8


@dataclass
class TierSets:
    """Which tokens each KV head holds. kept, marginal: bool (L, H_kv, tail_start); the tail, up to `seen`, is held."""

    kept: np.ndarray
    marginal: np.ndarray
    tail_start: int
    seen: int

    def new_since(self, earlier: "TierSets") -> np.ndarray:
        """Kept tokens that were not resident with K and V before: bool, as `kept`."""
        new = self.kept.copy()
        new[..., : earlier.tail_start] &= ~earlier.kept[..., : self.tail_start]
        new[..., earlier.tail_start : earlier.seen] = False
        return new


@dataclass
class AttentionSample:
    """One query's attention over the N tokens before and at it, in some heads.

    everything: whether the target saw all N; else its row is over what it held, and zero where that was evicted.
    rows: [(layer, query head, the target's row (N,), the draft's prediction of it (N,), kept and marginal (N,) bool)].
    """

    round: int
    position: int
    everything: bool
    rows: list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Trace:
    """Observer of one generation.

    path: JSONL file that gets a line per round, at once; output: what the lines call this generation. detailed: keep
    what the page shows besides: tier sets, alternatives and, where it can be known, attention.
    """

    spec: "SpecSmallKV"
    path: Path | None
    output: int = 0
    detailed: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    sets: list[TierSets] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)  # per emitted token: (id, probability)
    samples: list[AttentionSample] = field(default_factory=list)
    similarity: np.ndarray | None = None  # (L, H_q), of the head map

    def __post_init__(self) -> None:
        self._seconds: dict[str, float] = {}  # per phase, so far
        self._recalled = 0
        self._looked: np.ndarray | None = None  # (L, H_q, N), the target's row of the next round's first query
        self._looked_after = 0  # `Sequence.evicted_at` then

    @torch.inference_mode()
    def __call__(self, round_: "Round", sequence: "Sequence") -> None:
        sets = tier_sets(sequence.target)
        row = self._row(round_, sequence, sets)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self.detailed:
            self._compare_attention(sequence, sets)
            self.sets.append(sets)
        else:
            self.sets = [sets]

    def _row(self, round_: "Round", sequence: "Sequence", sets: TierSets) -> dict[str, Any]:
        """A line of the trace (docs/record.md)."""
        target, tokens = sequence.target, round_.tokens
        new = sets.new_since(self.sets[-1]) if self.sets else np.zeros_like(sets.kept)
        recalled, self._recalled = target.recall_bytes - self._recalled, target.recall_bytes
        return {
            "output": self.output,
            "round": len(self.rows),
            "position": len(sequence.tokens) - len(tokens),
            "tokens": tokens,
            "text": self.spec.pair.tokenizer.decode(tokens, clean_up_tokenization_spaces=False),
            "drafts": round_.drafts,
            "accepted": min(round_.num_accepted, len(tokens)),
            **self._probabilities(round_, sequence),
            "critical": [layer.num_slots for layer in target.layers],
            "marginal": [layer.num_marginal for layer in target.layers],
            "new": [float(x) for x in new.sum(-1).mean(-1).round(2)],
            "recall_bytes": recalled,
            "target_kv_bytes": target.nbytes,
            "target_kv_bytes_full": target.full_nbytes,
            "ms": self._milliseconds(sequence.counters.seconds),
        }

    def _milliseconds(self, seconds: dict[str, float]) -> dict[str, float]:
        """Of each phase since the last round."""
        since = {phase: 1000 * (total - self._seconds.get(phase, 0.0)) for phase, total in seconds.items()}
        self._seconds = dict(seconds)
        return {phase: round(ms, 3) for phase, ms in since.items() if ms > 0}

    def _probabilities(self, round_: "Round", sequence: "Sequence") -> dict[str, Any]:
        """The target's at temperature 1; of drafts up to the first that was refused, the draft's as it drew them."""
        assert sequence.logits is not None, "a round has logits"
        judged = round_.drafts[: round_.num_accepted + 1]
        target = sequence.logits[: len(judged) + 1].softmax(-1)  # the rows behind a refused draft mean nothing
        if self.detailed:
            best = target[: len(round_.tokens)].topk(min(NUM_ALTERNATIVES, target.shape[-1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.alternatives += [list(zip(*pair, strict=True)) for pair in pairs]
        return {
            "probabilities": picked(target, round_.tokens),
            "draft_probabilities": draft_probabilities(sequence, len(judged)),
            "target_probabilities": picked(target, judged),
        }

    # --- draft attention against target attention -----------------------------------------------------------------

    def _compare_attention(self, sequence: "Sequence", sets: TierSets) -> None:
        """Look at the next round's first query with the target before it runs; the draft's row is there after it."""
        if sequence.evidence.oracle is None:
            return
        if self._looked is not None and self._is_comparable(sequence):
            self.samples.append(self._sample(sequence, self._looked, sets))
        self._looked = None
        if is_power(len(self.rows), SAMPLED_EVERY):
            decoder = self.spec.decoder(Sampler())
            self._looked = None if decoder.reads_later(sequence) else true_row(decoder, sequence)
            self._looked_after = sequence.evicted_at

    def _is_comparable(self, sequence: "Sequence") -> bool:
        """Whether the draft's rows were read for the round, and the sets are those of its verify pass.

        A static policy's are already the next pass's, if tokens were evicted at the round's end.
        """
        oracle, same = sequence.reading, self._looked_after == sequence.evicted_at
        return oracle is not None and oracle.head_map is not None and (self.spec.policy.every_round or same)

    def _sample(self, sequence: "Sequence", looked: np.ndarray, sets: TierSets) -> AttentionSample:
        oracle, length = sequence.evidence.oracle, looked.shape[2]
        assert oracle is not None and oracle.head_map is not None
        self.similarity = oracle.head_map.similarity.cpu().numpy()
        everything = sees_everything(sequence) or not self.sets[-1].tail_start  # at first nothing is evicted
        sample = AttentionSample(len(self.rows) - 1, length - 1, everything, [])
        group = looked.shape[1] // sets.kept.shape[1]
        for layer, head in spread_heads(self.similarity, NUM_SAMPLED_HEADS):
            predicted = oracle.predict(layer)[head, 0, :length].cpu().numpy()
            kept, marginal = np.ones(length, dtype=bool), np.zeros(length, dtype=bool)
            kept[: sets.tail_start] = sets.kept[layer, head // group, :length]
            marginal[: sets.tail_start] = sets.marginal[layer, head // group, :length]
            sample.rows.append((layer, head, looked[layer, head], predicted, kept, marginal))
        return sample


def picked(probabilities: Tensor, tokens: list[int]) -> list[float]:
    """Probability of token i in row i."""
    index = torch.tensor(tokens, device=probabilities.device, dtype=torch.long).unsqueeze(1)
    return [round(p, 6) for p in probabilities[: len(tokens)].gather(1, index).squeeze(1).tolist()]


def draft_probabilities(sequence: "Sequence", count: int) -> list[float] | None:
    """The draft's own, of its first proposals; None unless its rows are read, since nobody else asks for them."""
    oracle = sequence.reading
    if oracle is None:
        return None
    chances = oracle.block.chances[: count + 1]  # products so far
    return [round(b / a, 6) if a else 0.0 for a, b in pairwise(chances)]


def tier_sets(cache: TieredCache) -> TierSets:
    """What the cache holds now; one transfer from the device for all layers."""
    layers, (_, heads) = cache.layers, cache.layers[0].kept_positions.shape[:2]
    tail_start = layers[0].tail_start
    kept = as_sets([layer.kept_positions for layer in layers], heads, tail_start)
    marginal = as_sets([layer.marginal_positions for layer in layers], heads, tail_start)
    return TierSets(kept, marginal, tail_start, cache.seen)


def as_sets(positions: list[Tensor], heads: int, length: int) -> np.ndarray:
    """Per layer positions (1, H_kv, n), any n and repeated ones too, as bool (L, H_kv, length)."""
    sets = np.zeros((len(positions) * heads, length), dtype=bool)
    flat = torch.cat([x.flatten() for x in positions]).cpu().numpy()
    rows = np.repeat(np.arange(len(sets)), np.repeat([x.shape[2] for x in positions], heads))
    sets[rows, flat] = True
    return sets.reshape(len(positions), heads, length)


def true_row(decoder: "Decoder", sequence: "Sequence") -> np.ndarray:
    """The target's attention (L, H_q, N) of the last token's query over the N tokens up to it.

    Over all of them, evicted ones included, where the host store has them; else over those whose keys are held,
    without the marginal values' part. One target pass that leaves the cache as it was.
    """
    config, length = decoder.target.config, sequence.target.seen + 1
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    rows = AttentionRows(num_layers, num_heads, 1, length, decoder.device)
    rows.start(length - 1, 1)
    call = AttentionCall(decoder.attention, rows=rows, everything=sees_everything(sequence))
    decoder.forward(decoder.target, sequence.target, sequence.tokens[-1:], call)
    row = rows.values[:, 0].view(num_layers, num_heads, length)
    if not call.everything:
        row = by_position(row, sequence.target)
    sequence.target.rollback(1)
    return row.cpu().numpy()


def sees_everything(sequence: "Sequence") -> bool:
    return all(layer.residency == "offload" for layer in sequence.target.layers)


def by_position(row: Tensor, cache: TieredCache) -> Tensor:
    """(L, H_q, N) by logical position, zero where no key is held, of one by the slots of the cache."""
    found = torch.zeros_like(row)
    for own, result, layer in zip(row, found, cache.layers, strict=True):
        positions = layer.positions[0].to(row.device)  # (H_kv, n)
        positions = positions.repeat_interleave(len(own) // len(positions), dim=0)
        result.scatter_(1, positions, own[:, : positions.shape[1]])
    return found


def spread_heads(similarity: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(layer, head) from the best matched to the worst, evenly by rank."""
    order = np.argsort(-similarity, axis=None, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [divmod(int(order[rank]), similarity.shape[1]) for rank in ranks]


def is_power(number: int, base: int) -> bool:
    """Whether number is 1, base, base**2, ..."""
    while number > 1 and number % base == 0:
        number //= base
    return number == 1
