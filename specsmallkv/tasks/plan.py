"""task=plan: the bytes that a run would take, from the two configurations alone; no weight is read.

Models lie on torch's meta device, where tensors have shapes and no memory. Tier sizes are the policy's own, scratch is
counted on the objects that a run would use. A run's record has the same keys, counted from its tensors.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..attention_form import head_dim, layer_windows
from ..config import RunConfig
from ..decode import Decoder
from ..display import Display
from ..draft_view import is_viewed, view_dtype
from ..errors import UserError
from ..four_bits import check_bits, four_bit_bytes, layers_to_round
from ..models import DRAFT_KEY, UNTRAINED, linear_of, refuse_cut, resolve_device, resolve_dtype
from ..packed_layer import SETTLED
from ..placement import empty_model
from ..policies import Policy
from ..prefill import in_chunks, while_reading
from ..random_model import empty as empty_random_model
from ..record import asked_for
from ..sources import read_config, resolve_config
from ..trimmed_head import IDS_KEY, trim_head

LONGEST = 2**24  # tokens; a context at which the pair breaks even is sought up to here


@dataclass
class Plan:
    """A pair on the meta device under one policy. own_draft_bytes: what the draft does not share with the target."""

    target: PreTrainedModel
    draft: PreTrainedModel | None
    policy: Policy
    num_draft_tokens: int
    dtype: torch.dtype
    target_weight_bytes: int
    draft_weight_bytes: int
    device: torch.device
    view_size: int  # speculation.draft_view_size
    oracle_every: int  # speculation's

    def row(self, context: int, new_tokens: int, batch_size: int) -> dict[str, Any]:
        """Bytes of a run of so many prompt and new tokens in each of `batch_size` rows; keys as in a run's record."""
        seen, held, full = self._fullest_pass(context, new_tokens)
        last = self._last_event(context, context + new_tokens - 1)
        host = self._host_bytes(last)
        draft = kv_bytes(self.draft, seen, self.dtype, "all") if self.draft is not None else 0
        scratch, capacity = self._scratch(context, new_tokens)
        each = {
            "target_kv_bytes": held,
            "target_kv_bytes_full": full,
            "target_kv_prefill_bytes": kv_bytes(self.target, capacity, self.dtype, "all"),
            "target_kv_host_bytes": host,
            "target_kv_window_bytes": self._window_bytes(last, seen),
            "draft_kv_bytes": draft,
            "scratch_bytes": scratch,
        }
        row = {key: count * batch_size for key, count in each.items()}
        row |= {"target_weight_bytes": self.target_weight_bytes, "draft_weight_bytes": self.draft_weight_bytes}
        windows = row["target_kv_window_bytes"]
        own = ("target_weight_bytes", "draft_weight_bytes", "target_kv_bytes", "draft_kv_bytes", "scratch_bytes")
        return row | {
            "kv_budget_effective": held / max(full, 1),
            "device_bytes": windows + sum(row[key] for key in own),
            "device_bytes_full": windows + self.target_weight_bytes + row["target_kv_bytes_full"],
        }

    def break_even(self, new_tokens: int, batch_size: int) -> int | None:
        """Shortest context at which the pair takes no more device bytes than the target with its full cache alone.

        None: it never does, since a token costs the pair as much as the full cache, or more.
        """

        def pays(context: int) -> bool:
            row = self.row(context, new_tokens, batch_size)
            return row["device_bytes"] <= row["device_bytes_full"]

        high = 1
        while not pays(high):
            high *= 2
            if high > LONGEST:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high

    def _events(self, context: int, end: int) -> list[int]:
        """Committed lengths at which tokens leave the window: behind the prompt, then multiples of evict_block."""
        block = self.policy.evict_block
        latest = end // block * block  # the last two say what the fullest pass is, however long the text
        return [context, *(event for event in (latest - block, latest) if context < event <= end)]

    def _fullest_pass(self, context: int, new_tokens: int) -> tuple[int, int, int]:
        """Tokens seen, bytes held and bytes of the full cache in the verify pass that holds most."""
        end, block = context + new_tokens - 1, self.policy.evict_block  # the last token is never read
        passes = []
        for event in self._events(context, end):
            seen = max(min((event // block + 1) * block, end), event) if self.policy.evicts else end
            passes.append((self._held(event, seen), seen))
        held, seen = max(passes)
        return end, held, kv_bytes(self.target, seen, self.dtype)

    def _held(self, event: int, seen: int) -> int:
        """Bytes on the device with `seen` tokens read, those since the last eviction waiting in the tail."""
        if not self.policy.due(event):
            return kv_bytes(self.target, seen, self.dtype)
        config, num_layers, units = self.target.config, layer_windows(self.target.config).count(None), 0.0
        for index in range(num_layers):
            sizes = self.policy.tiers(event, index, num_layers)
            critical = sizes.critical
            if self.policy.selection == "query":  # a union of sets: at most as many as queries
                chosen = critical - min(self.policy.window_size, critical)
                critical = min(event, critical + self.num_draft_tokens * chosen)
            window, cost = min(self.policy.window_size, critical), self.policy.critical_cost
            packed = (critical - window) * cost + self.policy.packing_overhead
            units += window + packed + sizes.marginal * self.policy.marginal_cost + seen - event
        return int(units * entry_bytes(config, self.dtype))

    def _window_bytes(self, event: int, seen: int) -> int:
        """Of layers with a sliding window, which drop in blocks what no window reaches: at most."""
        waiting = self.policy.evict_block + self.num_draft_tokens + 1
        slides = self.policy.due(event)
        windows = [window for window in layer_windows(self.target.config) if window is not None]
        tokens = sum(min(seen, window + waiting) if slides else seen for window in windows)
        return tokens * entry_bytes(self.target.config, self.dtype)

    def _last_event(self, context: int, end: int) -> int:
        return self._events(context, end)[-1]

    def _host_bytes(self, event: int) -> int:
        """Everything older than the tail, from the first eviction on."""
        if self.policy.residency != "offload" or not self.policy.due(event):
            return 0
        count = event - min(self.policy.window_size, event)
        older = kv_bytes(self.target, count, self.dtype)
        early = older // 2 if self.policy.key_bits is not None and count < SETTLED else 0
        return int(older * self.policy.critical_cost) + early

    def _scratch(self, context: int, new_tokens: int) -> tuple[int, int]:
        """Bytes of rows and sums, and the tokens that the target's cache has room for while the prompt is read."""
        whole: dict[str, Any] = {"prefill_chunk": 0} if self.policy.prefill_chunk else {}
        policy = replace(self.policy, **whole)
        decoder = Decoder(self.target, self.draft, policy, self.num_draft_tokens)  # needs no map: nothing is read
        sequence = decoder.start([0] * context, new_tokens)
        oracle, capacity = sequence.evidence.oracle, sequence.target.layers[0].capacity
        room = capacity
        if in_chunks(self.policy, context):
            held = while_reading(self.policy, context, context).plain_tiers(context).critical
            room = min(capacity, held + self.policy.prefill_chunk)
        config, scratch = self.target.config, 0
        if self.policy.reads_mass:
            scratch += 4 * config.num_hidden_layers * config.num_key_value_heads * capacity
        if oracle is not None:
            scratch += oracle.nbytes
            if self.policy.due(context):  # what the head map is fitted on, and what the heads did before
                scratch += 4 * config.num_hidden_layers * config.num_attention_heads * context
                if self.policy.every_round:  # the last block's mean row
                    scratch += 4 * oracle.block.buffer.shape[0] * capacity
        if self.policy.reads_last:
            queries = min(self.num_draft_tokens, new_tokens) + 1
            heads = layer_windows(config).count(None) * config.num_attention_heads
            scratch += heads * queries * entry_bytes(config, self.dtype) // (2 * config.num_key_value_heads)
        return scratch + self._view_bytes(capacity, oracle is not None), room

    def _view_bytes(self, capacity: int, oracle_reads: bool) -> int:
        """What drafting steps read instead of a long cache, and the row that chose it where no oracle has rows."""
        lookahead = self.policy.lookahead if oracle_reads else "first"  # a first step then reads the whole cache
        steps = self.num_draft_tokens - (lookahead != "block")
        if self.draft is None or steps < 1 or any(layer_windows(self.draft.config)):
            return 0
        if not is_viewed(self.view_size, capacity, lookahead == "drafted" and self.oracle_every == 1):
            return 0
        config, slots = self.draft.config, self.view_size + self.num_draft_tokens + 2
        row = 0 if oracle_reads else 4 * config.num_hidden_layers * config.num_attention_heads * capacity
        return row + kv_bytes(self.draft, slots, view_dtype(self.dtype, self.device), "all")


def entry_bytes(config: Any, dtype: torch.dtype) -> int:
    """K and V of one token in one layer."""
    return 2 * config.num_key_value_heads * head_dim(config) * dtype.itemsize


def kv_bytes(model: PreTrainedModel, tokens: int, dtype: torch.dtype, layers: str = "budgeted") -> int:
    """A full cache of so many tokens: of the layers that a budget is about, or of "all"."""
    count = model.config.num_hidden_layers if layers == "all" else layer_windows(model.config).count(None)
    return count * entry_bytes(model.config, dtype) * tokens


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype, form: str, bits: int | None = None) -> int:
    """Parameters as a run counts them: each once, but a packed layer holds a copy of what an embedding shares.

    bits: `model.draft_bits`, of a draft whose layers are counted as `four_bits.py` holds them.
    """
    slots = layers_to_round(model) if bits else []
    few = {id(layer.weight): layer.weight for _, _, layer in slots if isinstance(layer, nn.Linear)}
    linear = {id(m.weight): m.weight for m in model.modules() if type(m) is nn.Linear and id(m.weight) not in few}
    own = {id(p): p for m in model.modules() for p in m.parameters(recurse=False) if id(p) not in few}
    if form != "torch":
        others = (m for m in model.modules() if type(m) is not nn.Linear)
        kept = {id(p) for m in others for p in m.parameters(recurse=False)}
        own = {key: p for key, p in own.items() if key not in linear or key in kept}
    copies = 0 if form == "torch" else sum(weight.numel() for weight in linear.values())
    plain = dtype.itemsize * sum(p.numel() for p in own.values()) + sum(four_bit_bytes(w, dtype) for w in few.values())
    return (2 if form == "packed" else dtype.itemsize) * copies + plain


def without_shared(draft: PreTrainedModel, head_rows: int | None) -> None:
    """Of a distilled draft: the embeddings are the target's, and the head too unless it is one of its own."""
    head = nn.Linear(draft.config.hidden_size, head_rows, bias=False, device="meta") if head_rows else nn.Identity()
    draft.set_input_embeddings(nn.Identity())
    draft.set_output_embeddings(head)


def head_rows_of(directory: Path) -> int | None:
    """Tokens of a trimmed head, from the header of the weights' file."""
    path = directory / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_slice(IDS_KEY).get_shape()[0] if IDS_KEY in file.keys() else None  # noqa: SIM118


def on_meta(source: str, quiet: bool) -> tuple[PreTrainedModel, int | None, bool]:
    """The model without weights; of a distilled draft also the rows of its head, and that it shares embeddings."""
    if source.startswith("random:"):
        return empty_random_model(source), None, False
    directory = resolve_config(source, quiet)
    facts = read_config(directory, source).get(DRAFT_KEY) or {}
    return empty_model(directory, source), head_rows_of(directory), bool(facts.get("shares_embeddings"))


def make_plan(config: RunConfig) -> tuple[Plan, str]:
    """The pair that a run would load, and how its weights would lie (`linear.py`)."""
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device, config.model.linear)
    linear = linear_of(config.model, dtype, device)
    num_draft_tokens = asked_for(config)["num_draft_tokens"]
    target, _, _ = on_meta(config.model.target, config.quiet)
    target_bytes, draft, draft_bytes = weight_bytes(target, dtype, linear), None, 0
    if num_draft_tokens or config.policy.reads_draft:
        if config.model.draft is None:
            raise UserError(
                f"model {config.model.name} names no draft; set model.draft, or use policy=full speculation=none."
            )
        draft, head_rows, shares = on_meta(config.model.draft.removeprefix(UNTRAINED), config.quiet)
        refuse_cut(config.model, head_rows)
        cut = config.model.draft_vocab_size
        cut = cut if cut < draft.config.vocab_size else 0
        if shares:
            without_shared(draft, head_rows or cut or None)
        elif cut:
            trim_head(draft, torch.arange(cut), keep_full=True)
        check_bits(config.model.draft_bits, device, config.model.compile is not None)
        draft_bytes = weight_bytes(draft, dtype, linear, config.model.draft_bits)
    for model in filter(None, (target, draft)):
        model.to(dtype)
    view_size, every = config.speculation.draft_view_size, config.speculation.oracle_every
    policy = config.policy.fitted(head_dim(target.config), dtype.itemsize)
    plan = Plan(target, draft, policy, num_draft_tokens, dtype, target_bytes, draft_bytes, device, view_size, every)
    return plan, linear


@dataclass
class PlanTask:
    """context_tokens: of each prompt. batch_size and max_new_tokens are the run's."""

    name: str
    context_tokens: int
    uses_batch_size = True

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise UserError(f"task.context_tokens={self.context_tokens} is too small; give at least 1.")

    def run(self, config: RunConfig) -> dict[str, Any]:
        display = Display(config.quiet)
        with display.waiting("reading the configurations"):
            plan, linear = make_plan(config)
        windows = [m.config.max_position_embeddings for m in (plan.target, plan.draft) if m is not None]
        needed = self.context_tokens + config.max_new_tokens
        if needed > min(windows):
            raise UserError(
                f"task.context_tokens={self.context_tokens} and max_new_tokens={config.max_new_tokens} exceed the "
                f"context window of {min(windows)} tokens; shorten one of them."
            )
        record = asked_for(config) | plan.row(self.context_tokens, config.max_new_tokens, config.batch_size)
        record |= {
            "device": str(resolve_device(config.model.device)),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "linear": linear,
            "prompt_tokens": self.context_tokens,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.batch_size,
            "context_window": min(windows),
            "break_even_context_tokens": plan.break_even(config.max_new_tokens, config.batch_size),
            "planned": True,
        }
        display.plan(record, config.policy)
        return record
