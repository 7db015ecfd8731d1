"""task=fidelity: how far each policy's next-token distributions are from the full cache's, teacher-forced on a text.

The first `context_tokens` of the text are the prompt; the next `eval_tokens` are scored in verify blocks of
`num_draft_tokens` + 1. All policies and budgets and the full cache advance together: the draft reads a block once, and
the target reads it in one pass with a batch row for each. So all are compared on the same positions, rounding in
passes of one shape is no distance, and a trial costs little more than its share of attention. Static policies do not
depend on where blocks begin (invariant 2).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..attention import AttentionCall, AttentionMass
from ..cache import TieredCache
from ..config import RunConfig
from ..decode import Decoder, Sequence
from ..display import Display
from ..errors import UserError
from ..generator import SpecSmallKV
from ..metrics import Scores, attention_recall, bootstrap_interval, jaccard_of_top
from ..policies import Policy
from ..presets import load_policy
from .generate import load_generator, setting_figures
from .grid import neediest, policy_grid

MEASURE_EVERY = 8  # blocks between two looks at the attention itself, which costs a full read


@dataclass
class Block:
    """A verify block that begins with the text's token at `position`; the first `count` positions are scored.

    A position is scored if every token read up to it is the text's own. measure: look at the attention itself too.
    """

    position: int
    drafts: list[int]
    count: int
    measure: bool


@dataclass
class Trial:
    """One policy at one budget: its own target cache, the shared draft. The full cache is a trial as well."""

    policy: Policy
    decoder: Decoder
    sequence: Sequence
    scores: Scores = field(default_factory=Scores)
    recall: list[list[float]] = field(default_factory=list)
    jaccard: list[float] = field(default_factory=list)
    byte_share: list[float] = field(default_factory=list)

    def score(self, logits: Tensor, full: Tensor, following: list[int]) -> None:
        """logits (n, V) and the full cache's log-probabilities `full` (n, V) of the scored positions."""
        self.byte_share.append(self.sequence.target.nbytes / self.sequence.target.full_nbytes)
        self.scores.add(logits, full, following)

    def commit(self, block: Block, text: list[int]) -> None:
        """Drop what the text does not say."""
        self.sequence.tokens = text[: block.position + block.count + 1]
        self.decoder.rollback(self.sequence, len(block.drafts) + 1 - block.count)

    def measure(self, queries: dict[int, Tensor], full: TieredCache) -> None:
        """Attention mass and overlap per layer, by the full cache's keys and its queries (1, H_q, n, D)."""
        scaling, recall, jaccard = self.sequence.evidence.scaling, [], []
        for index, layer in enumerate(self.sequence.target.layers):
            keys = full.layers[index].keys
            recall.append(attention_recall(layer, queries[index], keys, scaling))
            if layer.num_kept:
                jaccard.append(jaccard_of_top(layer, queries[index], keys, scaling))
        self.recall.append(recall)
        self.jaccard += jaccard


def step(base: "Base", trials: list[Trial], text: list[int], block: Block) -> None:
    """One verify block of all trials, the first of which is the full cache's, in one pass of the target."""
    sequences, drafts = [trial.sequence for trial in trials], block.drafts
    for sequence in sequences:
        sequence.tokens = text[: block.position + 1]
    plan(base.decoder, trials, drafts)
    calls = [base.decoder.verify_call(sequence, len(drafts) + 1) for sequence in sequences]
    calls[0].num_queries = len(drafts) + 1
    logits = base.decoder.verify_group(sequences, [drafts] * len(trials), calls)[:, : block.count]
    full = logits[0].log_softmax(-1)
    following = text[block.position + 1 : block.position + 1 + block.count]
    for trial, own in zip(trials, logits, strict=True):
        trial.score(own, full, following)
        trial.commit(block, text)
    queries = {index: x[:, :, : block.count] for index, x in calls[0].queries.items()}
    for trial in trials:
        if block.measure:
            trial.measure(queries, sequences[0].target)
        trial.decoder.evict(trial.sequence)


def plan(decoder: Decoder, trials: list[Trial], drafts: list[int]) -> None:
    """Every trial's plan; those that look at the target's own attention look together."""
    looking = [trial for trial in trials if trial.policy.reads_target and trial.policy.due(trial.sequence.evicted_at)]
    looks = decoder.look([trial.sequence for trial in looking], [drafts] * len(looking)) if looking else []
    seen = dict(zip(map(id, looking), looks, strict=True))
    for trial in trials:
        trial.decoder.plan(trial.sequence, drafts, seen.get(id(trial)))


@dataclass
class FidelityTask:
    """text_file, offset (characters), context_tokens, eval_tokens; rows: drafted or gold.

    policies: preset names, each at every one of kv_budgets; policy.num_sink_tokens, window_size and evict_block apply
    to all of them, policy.kv_budget to none, the other fields to the one that `policy` names.
    """

    name: str
    text_file: str | None
    offset: int
    context_tokens: int
    eval_tokens: int
    rows: str
    policies: list[str]
    kv_budgets: list[float]

    def __post_init__(self) -> None:
        if self.rows not in ("drafted", "gold"):
            raise UserError(f"task.rows={self.rows} is unknown; choose drafted or gold.")
        for key, least in (("offset", 0), ("context_tokens", 64), ("eval_tokens", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)} is too small; give at least {least}.")

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        display = Display(config.quiet)
        policies = self._policies(config.policy)
        config.policy = neediest(policies)
        with display.waiting("loading the models"):
            spec = load_generator(config)
        text = self._tokens(spec)
        spec.check_length(text, 1)
        with display.waiting(f"reading {self.context_tokens} tokens"):
            base = prefill_once(spec, config.policy, text, self.context_tokens, policies)
            full, *trials = [open_trial(spec, policy, base) for policy in (load_policy("full"), *policies)]
        self._score(base, [full, *trials], text, config.quiet)
        results = [summary(trial, trials) for trial in trials]
        draft_bytes = base.sequence.draft.nbytes if base.sequence.draft else 0
        display.fidelity(results)
        figures = {"results": results, "rows": self.rows, "prompt_tokens": self.context_tokens, "text": None}
        return setting_figures(config, spec) | results[0] | figures | {"draft_kv_bytes": draft_bytes}

    def _policies(self, chosen: Policy) -> list[Policy]:
        if self.context_tokens <= chosen.num_sink_tokens + chosen.window_size:
            raise UserError(
                f"task.context_tokens={self.context_tokens} leaves nothing to evict beside policy.num_sink_tokens and "
                f"policy.window_size={chosen.window_size}; give more."
            )
        if not (self.policies and self.kv_budgets):
            raise UserError("task.policies or task.kv_budgets is empty; name at least one of each.")
        return policy_grid(chosen, self.policies, self.kv_budgets)

    def _tokens(self, spec: SpecSmallKV) -> list[int]:
        needed = self.context_tokens + self.eval_tokens + 1
        text = read_text(self.text_file)[self.offset : self.offset + 12 * needed]
        tokens = spec.pair.tokenizer(text)["input_ids"]
        if len(tokens) < needed:
            raise UserError(
                f"task.text_file={self.text_file} has {len(tokens)} tokens from character {self.offset} on, "
                f"{needed} are needed; lower task.context_tokens or task.eval_tokens."
            )
        return tokens[:needed]

    def _score(self, base: "Base", trials: list[Trial], text: list[int], quiet: bool) -> None:
        """Block after block until `eval_tokens` positions are scored."""
        position, number = self.context_tokens, 0
        with Progress(console=Display(quiet).console, transient=True) as progress:
            bar = progress.add_task("scoring", total=self.eval_tokens)
            while position < len(text) - 1:
                drafts = base.draft(text, position, gold=self.rows == "gold")
                count = matching_prefix(drafts, text[position + 1 :]) + 1
                step(base, trials, text, Block(position, drafts, count, measure=number % MEASURE_EVERY == 0))
                base.commit(position + count)
                progress.advance(bar, count)
                position, number = position + count, number + 1


def read_text(path: str | None) -> str:
    if path is None:
        raise UserError("task=fidelity needs a text; set task.text_file=FILE.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"task.text_file={path} is not UTF-8; convert it, for example with iconv -t utf-8.") from None


def matching_prefix(drafts: list[int], following: list[int]) -> int:
    """How many drafts are what the text says next."""
    pairs = zip(drafts, following, strict=False)
    return next((i for i, (draft, token) in enumerate(pairs) if draft != token), min(len(drafts), len(following)))


@dataclass
class Base:
    """What all trials share: the draft with its cache and rows, and the target's cache of the prompt."""

    decoder: Decoder
    sequence: Sequence

    def draft(self, text: list[int], position: int, gold: bool) -> list[int]:
        """Drafts for the block that begins with the text's token at `position`; their rows lie in the oracle.

        Blocks are cut where a static policy evicts, for all policies alike.
        """
        decoder, oracle = self.decoder, self.sequence.evidence.oracle
        block = decoder.policy.evict_block
        count = min(decoder.num_draft_tokens, len(text) - 2 - position, block - position % block - 1)
        following = text[position + 1 : position + 1 + count]
        if oracle is None:
            return following
        oracle.block.start(position, count + 1)
        call = AttentionCall(decoder.attention, rows=oracle.block)
        tokens, cache = text[position : position + 1], self.sequence.draft
        if gold:
            decoder.forward(decoder.draft_model, cache, tokens + following, call)
            return following
        for step in range(count + 1):
            probabilities = decoder.forward(decoder.draft_model, cache, tokens[-1:], call)[-1].softmax(-1)
            tokens.append(int(probabilities.argmax()))
            if step < count:
                oracle.block.expect(float(probabilities.max()))
        return tokens[1 : count + 1]

    def commit(self, position: int) -> None:
        if self.sequence.draft is not None:
            self.sequence.draft.rollback(max(0, self.sequence.draft.seen - position))


def prefill_once(spec: SpecSmallKV, policy: Policy, text: list[int], context: int, policies: list[Policy]) -> Base:
    """Read the prompt with both models."""
    decoder = Decoder(spec.pair.target, spec.pair.draft, policy, spec.num_draft_tokens, attention=spec.attention)
    sequence = decoder.start(text[:context], len(text) - context)
    if any(policy.reads_mass for policy in policies):
        sequence.evidence.mass = AttentionMass(sequence.target.layers[0].capacity)
    decoder.prefill(sequence)
    decoder.prefill_draft(sequence)
    return Base(decoder, sequence)


def open_trial(spec: SpecSmallKV, policy: Policy, base: Base) -> Trial:
    """A trial with its own copy of the prompt's cache; the draft's rows and the fit are the base's."""
    decoder = Decoder(spec.pair.target, spec.pair.draft, policy, spec.num_draft_tokens, attention=spec.attention)
    sequence = decoder.branch(base.sequence)
    sequence.draft = None  # the base drafts for all
    return Trial(policy, decoder, sequence)


def summary(trial: Trial, trials: list[Trial]) -> dict[str, Any]:
    """One row of `results`; ratios are against snapkv at the same budget, with a paired bootstrap interval."""
    scores, counters, cache = trial.scores, trial.sequence.counters, trial.sequence.target
    new = counters.new_entries
    row: dict[str, Any] = {
        "policy": trial.policy.name,
        "kv_budget": trial.policy.kv_budget,
        "scored_tokens": len(scores.kl),
        "kl_mean": mean(scores.kl),
        "kl_median": float(torch.tensor(scores.kl).median()),
        "top1_agreement": mean(scores.agrees),
        "nll": mean(scores.nll),
        "nll_full": mean(scores.nll_full),
        "attention_recall": mean([share for layers in trial.recall for share in layers]),
        "attention_recall_per_layer": [mean(layer) for layer in zip(*trial.recall, strict=True)],
        "jaccard": mean(trial.jaccard),
        "kv_share_mean": mean(trial.byte_share),
        "target_kv_bytes": counters.max_target_bytes,
        "target_kv_bytes_full": counters.full_bytes_then,
        "target_kv_host_bytes": cache.host_nbytes,
        "recall_bytes": cache.recall_bytes,
        "new_per_round": mean(new),
        "kept_per_layer": cache.kept_per_layer(),
    }
    rival = next(
        (t for t in trials if t.policy.name == "snapkv" and t.policy.kv_budget == trial.policy.kv_budget), None
    )
    if rival is not None:
        row["kl_ratio_to_snapkv"] = row["kl_mean"] / max(mean(rival.scores.kl), 1e-12)
        row["kl_ratio_to_snapkv_interval"] = bootstrap_interval(scores.kl, rival.scores.kl)
    return row


def mean(values: Iterable[float]) -> float:
    """NaN, which a record shows as null, if there are none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")
