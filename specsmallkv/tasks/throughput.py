"""task=throughput: how fast each policy decodes, beside transformers' own generation, from one prefill in one process.

A prompt is read once; every system starts from a copy of its caches and decodes `batch_size` prompts at once. Repeats
are interleaved in turns, so that a machine whose speed drifts is fair to all; medians count. `throughput_systems.py`
has the systems, `roofline.py` the bounds.
"""

from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import transformers
from packaging.version import Version

from ..attention import AttentionMass
from ..attention_form import refuse_windows
from ..compiled import check_compile
from ..config import RunConfig
from ..controller import make_controller
from ..decode import Decoder
from ..display import Display
from ..errors import UserError
from ..four_bits import check_bits
from ..generator import SpecSmallKV
from ..linear import Slot, linear_layers
from ..models import linear_of, load_pair, resolve_device, resolve_dtype
from ..policies import Policy
from ..presets import load_policy
from ..prompts import read_requests, read_text
from ..sequence import Round
from ..trimmed_head import whole_head
from .generate import setting_figures
from .grid import neediest, policy_grid
from .roofline import Machine, measure_machine, roofline
from .texts import passage
from .throughput_kvpress import KVPRESS, PressSystem, press_of
from .throughput_systems import (
    ADAPTS,
    ONE_BY_ONE,
    SPECULATES,
    STOCK,
    OwnSystem,
    Prompt,
    Run,
    StockSystem,
    exchanged,
    read_prompt,
)

Row = dict[str, Any]
LEFT_OUT = object()
BASES = ("transformers", "assisted", "full")  # what ratios are taken against


@dataclass
class Measured:
    """A system and its repeats."""

    system: OwnSystem | StockSystem
    runs: list[Run] = field(default_factory=list)

    def rate(self, clock: str = "seconds") -> list[float]:
        """Tokens a second of each repeat; clock: "seconds" or "cpu_seconds"."""
        return [run.num_tokens / max(getattr(run, clock), 1e-9) for run in self.runs]


@dataclass
class ThroughputTask:
    """text_file, offset, context_tokens: the prompt, else the run's own. systems: see conf/task/throughput.yaml.

    num_prompts: passages of the text, one behind the other, or first rows of a prompts_file; None: one batch, or all
    rows. The run's batch_size says how many are decoded at once.

    repeats and warmup_tokens of each system; assistant_tokens and lookup_tokens of transformers' own speculation;
    stock_prefill: time transformers' prefill too.
    """

    name: str
    text_file: str | None
    offset: int
    context_tokens: int
    num_prompts: int | None
    repeats: int
    warmup_tokens: int
    systems: list[str]
    assistant_tokens: int
    lookup_tokens: int
    stock_prefill: bool

    uses_batch_size = True

    def __post_init__(self) -> None:
        rules = {"offset": 0, "context_tokens": 16, "repeats": 1, "warmup_tokens": 1}
        for key, least in (rules | {"assistant_tokens": 1, "lookup_tokens": 1}).items():
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)} is too small; give at least {least}.")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise UserError(f"task.num_prompts={self.num_prompts} is too small; give at least 1, or null.")
        if not self.systems or len(set(self.systems)) < len(self.systems):
            raise UserError(f"task.systems=[{','.join(self.systems)}] is empty or names one twice; name each once.")
        older = Version(transformers.__version__) < Version("5.3")
        if newer := [name for name in self.systems if name in STOCK[1:] and older]:
            raise UserError(
                f"task.systems={newer[0]} needs transformers 5.3 or newer, since {transformers.__version__} cannot "
                "begin it with a prompt's cache; leave it out."
            )

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        if config.temperature:
            raise UserError(f"temperature={config.temperature:g}: task=throughput decodes greedily; leave it out.")
        if config.max_new_tokens < 2:
            raise UserError(f"max_new_tokens={config.max_new_tokens} is too few for task=throughput; give 2 or more.")
        display, chosen = Display(config.quiet), config.policy
        policies = {name: self._policy(chosen, name) for name in self.systems if name not in STOCK}
        if KVPRESS in policies:
            press_of(policies[KVPRESS])  # refused before anything is loaded
        with display.waiting("loading the models"):
            spec, originals = self._load(config, policies)
        refuse_windows("task=throughput", *(m.config for m in (spec.pair.target, spec.pair.draft) if m is not None))
        batches, machine = self._batches(config, spec), measure_machine(spec.pair.target)
        by_prompt, interrupted = self._by_prompt(config, spec, policies, originals, batches, machine, display)
        rows = over_prompts(by_prompt)
        display.throughput(rows)
        figures = headline(rows, chosen, config.speculation.name) | {"systems": rows, "machine": vars(machine)}
        figures |= {"threads": torch.get_num_threads(), "interrupted": interrupted}
        figures |= {"by_prompt": by_prompt} if len(by_prompt) > 1 else {}
        done = [len(tokens) for batch in batches[: len(by_prompt)] for tokens in batch]
        figures |= {"num_prompts": len(done), "batch_size": config.batch_size, "prompt_tokens": median(done)}
        return setting_figures(config, spec) | figures

    def _by_prompt(
        self,
        config: RunConfig,
        spec: SpecSmallKV,
        policies: dict[str, Policy],
        originals: list[Slot],
        batches: list[list[list[int]]],
        machine: Machine,
        display: Display,
    ) -> tuple[list[list[Row]], bool]:
        """Each batch's row per system, and whether Ctrl-C ended it, which only the first batch can survive in part."""
        by_prompt: list[list[Row]] = []
        for number, batch in enumerate(batches):
            prompts = []
            try:
                for place, tokens in enumerate(batch, start=config.batch_size * number + 1):
                    with display.waiting(f"prompt {place} of {sum(map(len, batches))}: reading {len(tokens)} tokens"):
                        prompts.append(self._read(config, spec, list(policies.values()), tokens))
                measured = self._systems(config, spec, policies, prompts, originals)
                interrupted = self._measure(measured, config.max_new_tokens, display, bool(by_prompt))
                rows = with_ratios([self._row(x, spec, machine) for x in measured if x.runs])
                measured = []  # with their caches, before others are read
            except KeyboardInterrupt:
                if not by_prompt:
                    raise
                return by_prompt, True
            if interrupted:
                return by_prompt or [rows], True
            by_prompt.append(rows)
        return by_prompt, False

    # --- what is measured ----------------------------------------------------------------------------------------

    def _policy(self, chosen: Policy, name: str) -> Policy:
        entry = "snapkv" if name == KVPRESS else name.removesuffix(SPECULATES).removesuffix(ADAPTS)
        (policy,) = policy_grid(chosen, [entry], [chosen.kv_budget])
        return policy

    def _load(self, config: RunConfig, policies: dict[str, Policy]) -> tuple[SpecSmallKV, list[Slot]]:
        """The pair, and its layers before they were packed, for transformers' own systems."""
        speculates = any(name.endswith((SPECULATES, ADAPTS)) or name == "assisted" for name in self.systems)
        need_draft = speculates or any(policy.reads_draft for policy in policies.values())
        device = resolve_device(config.model.device)
        resolved = resolve_dtype(config.model.dtype, device, config.model.linear)
        dtype = str(resolved).removeprefix("torch.")
        linear = linear_of(config.model, resolved, device)
        check_compile(config.model.compile, device, linear)
        if need_draft:
            check_bits(config.model.draft_bits, device, config.model.compile is not None)
        plain = replace(config.model, linear="torch", dtype=dtype, draft_bits=None)
        pair = load_pair(plain, need_draft, config.quiet)
        models = [model for model in (pair.target, pair.draft) if model is not None]
        originals: list[Slot] = []
        if linear != "torch" or config.model.draft_bits:
            if any(name in (*STOCK, KVPRESS) for name in self.systems):
                originals = [slot for model in models for slot in linear_layers(model)]
            pair.pack(linear, config.model.draft_bits)
        if pair.draft is not None and (whole := whole_head(pair.draft)):
            originals.append((pair.draft, "lm_head", whole))
        num_draft_tokens = max(1, config.speculation.num_draft_tokens) if speculates else 0
        policy = neediest(list(policies.values()) or [load_policy("full")])
        return SpecSmallKV(pair, policy, num_draft_tokens, config.model.attention), originals

    def _batches(self, config: RunConfig, spec: SpecSmallKV) -> list[list[list[int]]]:
        """Token ids of the prompts that are decoded together, all of them checked before the first is read."""
        size, prompts = config.batch_size, self._prompts(config, spec)
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        if len(batches[-1]) < size:
            raise UserError(
                f"batch_size={size} does not divide the {len(prompts)} prompts; give task.text_file=FILE, or a "
                f"prompts_file and task.num_prompts with a multiple of {size}."
            )
        if size > 1 and any(name in (*STOCK, KVPRESS) for name in self.systems):
            lengths = sorted(set(map(len, prompts)))
            if alone := [name for name in self.systems if name in ONE_BY_ONE]:
                raise UserError(
                    f"task.systems={alone[0]} decodes one prompt at a time; leave it out, or use batch_size=1."
                )
            if len(lengths) > 1:
                raise UserError(
                    f"task.systems=transformers needs prompts of one length, not of {lengths[0]} to {lengths[-1]} "
                    "tokens; give a task.text_file, or leave it out."
                )
        return batches

    def _prompts(self, config: RunConfig, spec: SpecSmallKV) -> list[list[int]]:
        if self.text_file is not None:
            content = read_text("task.text_file", self.text_file)
            count = self.num_prompts or config.batch_size
            needed, lower = count * self.context_tokens, "task.context_tokens or task.num_prompts"
            tokens = passage(spec, self.text_file, content, self.offset, needed, lower, self.context_tokens)
            prompts = [tokens[i : i + self.context_tokens] for i in range(0, needed, self.context_tokens)]
        else:
            requests = read_requests(config)[: self.num_prompts]
            said: list[Any] = [x.prompt if x.messages is None else x.messages for x in requests]
            prompts = [spec.encode(x, config.chat) for x in said]
        for tokens in prompts:
            spec.check_length(tokens, config.max_new_tokens + 1)
        return prompts

    def _read(self, config: RunConfig, spec: SpecSmallKV, policies: list[Policy], tokens: list[int]) -> Prompt:
        mass = AttentionMass if any(policy.reads_mass for policy in policies) else None
        return read_prompt(spec.decoder(), tokens, config.max_new_tokens + 1, mass)

    def _systems(
        self,
        config: RunConfig,
        spec: SpecSmallKV,
        policies: dict[str, Policy],
        prompts: list[Prompt],
        originals: list[Slot],
    ) -> list[Measured]:
        pair = spec.pair
        systems: list[StockSystem | OwnSystem] = []
        drafting = {
            "num_assistant_tokens": self.assistant_tokens,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        for name in self.systems:
            if name in STOCK:
                options = {"prompt_lookup_num_tokens": self.lookup_tokens} if name == "prompt_lookup" else {}
                systems.append(StockSystem(name, prompts, pair.draft, originals, options, drafting))
            elif name == KVPRESS:
                systems.append(PressSystem(prompts, originals, policies[name]))
            else:
                count = spec.num_draft_tokens if name.endswith((SPECULATES, ADAPTS)) else 0
                asked = replace(config.speculation, adaptive=name.endswith(ADAPTS))
                controller = make_controller(asked, config.model.name, policies[name].name.partition(":")[0])
                decoder = Decoder(
                    pair.target, pair.draft, policies[name], count, None, spec.attention, pair.head_map, controller
                )
                systems.append(OwnSystem(name, decoder, prompts))
        return [Measured(system) for system in systems]

    def _measure(self, measured: list[Measured], num_tokens: int, display: Display, has_results: bool) -> bool:
        """Every system in turn, again and again, each time another one first; whether Ctrl-C ended it."""
        try:
            for own in measured:
                with display.waiting(f"warming up {own.system.name}"):
                    own.system.run(min(self.warmup_tokens, num_tokens))
                    if own.system.lacks_costs:  # so few tokens had no room for as many drafts
                        own.system.run(num_tokens)
            for repeat in range(self.repeats):
                first = repeat % len(measured)
                for own in measured[first:] + measured[:first]:
                    with display.waiting(f"repeat {repeat + 1} of {self.repeats}: {own.system.name}"):
                        own.runs.append(own.system.run(num_tokens))
                        if repeat:  # the last one's caches tell all that is reported of caches
                            own.runs[-2].sequences.clear()
        except KeyboardInterrupt:
            if not (has_results or any(own.runs for own in measured)):
                raise
            return True
        return False

    # --- what is reported ----------------------------------------------------------------------------------------

    def _row(self, measured: Measured, spec: SpecSmallKV, machine: Machine) -> dict[str, Any]:
        """One system's figures; counts are those of its last repeat, since greedy repeats do the same."""
        system, last, pair = measured.system, measured.runs[-1], spec.pair
        uses_draft = last.steps > 0 or any(sequence.draft is not None for sequence in last.sequences)
        row = {"name": system.name, "repeats": len(measured.runs), "new_tokens": last.num_tokens}
        for key, clock in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
            rates = measured.rate(clock)
            row |= {key: median(rates), f"{key}_min": min(rates), f"{key}_max": max(rates)}
        row |= self._own_figures(measured) if isinstance(system, OwnSystem) else self._stock_figures(system)
        tokens, drafts = last.num_tokens, [x.base.draft for x in system.prompts if uses_draft and x.base.draft]
        row |= {
            "acceptance_length": tokens / max(len(last.rounds) or last.passes * len(last.tokens), 1),
            "kv_bytes_read_per_token": last.target_kv_read / tokens,
            "draft_kv_bytes_read_per_token": last.draft_kv_read / tokens,
            "draft_kv_bytes": sum(draft.nbytes for draft in drafts),
            "peak_memory_bytes": max((run.peak_memory_bytes or 0 for run in measured.runs), default=0) or None,
            "text": pair.tokenizer.decode(last.tokens[0]),
            "token_ids": last.tokens,
        }
        with exchanged(system.originals if isinstance(system, StockSystem) else []):
            row |= {"draft_weight_bytes": pair.draft_weight_bytes if uses_draft else 0}
            return row | roofline(machine, last, pair.target, pair.draft if uses_draft else None)

    def _own_figures(self, measured: Measured) -> dict[str, Any]:
        last, prompts = measured.runs[-1], measured.system.prompts
        sequences, rounds = last.sequences, last.rounds
        assert sequences and isinstance(measured.system, OwnSystem)
        counters, policy = last.counters, measured.system.decoder.policy
        drafted, accepted = counters.drafted, counters.accepted
        recalling = sum(sequence.counters.recall_seconds for sequence in sequences)
        return {
            "policy": policy.name,
            "kv_budget": policy.kv_budget,
            "num_draft_tokens": measured.system.decoder.num_draft_tokens,
            "ttft_seconds": measured.system.ttft(last),
            "draft_prefill_seconds": prompts[0].draft_seconds if sequences[0].draft is not None else 0.0,
            "phase_ms": {key: 1e3 * value / last.passes for key, value in counters.seconds.items()},
            "recall_ms": 1e3 * recalling / last.passes,
            "draft_step_ms": 1e3 * counters.seconds["draft"] / drafted if drafted else None,
            "phase_cpu_ms": {key: 1e3 * value / last.passes for key, value in counters.cpu_seconds.items()},
            "acceptance_rate": accepted / drafted if drafted else None,
            "acceptance_per_position": per_position(rounds),
            "target_kv_bytes": counters.max_target_bytes,
            "target_kv_bytes_full": sum(sequence.counters.full_bytes_then for sequence in sequences),
            "target_kv_host_bytes": sum(sequence.target.host_nbytes for sequence in sequences),
            "scratch_bytes": sum(sequence.held()["scratch_bytes"] for sequence in sequences),
            "recall_bytes_per_token": sum(sequence.target.recall_bytes for sequence in sequences) / last.num_tokens,
            "kept_per_layer": sequences[0].target.kept_per_layer(),
        }

    def _stock_figures(self, system: StockSystem) -> dict[str, Any]:
        nbytes = sum(prompt.base.target.full_nbytes for prompt in system.prompts)
        seconds = system.prefill() if self.stock_prefill and system.name == "transformers" else None
        drafts = {"assisted": self.assistant_tokens, "prompt_lookup": self.lookup_tokens}.get(system.name, 0)
        own = {"policy": None, "kv_budget": 1.0, "ttft_seconds": seconds, "acceptance_rate": None}
        own |= {"num_draft_tokens": drafts}
        return own | {"target_kv_bytes": nbytes, "target_kv_bytes_full": nbytes}


def per_position(rounds: list[Round]) -> list[float]:
    """Of the rounds that drafted an i-th token, the share that accepted it."""
    longest = max((round_.num_drafted for round_ in rounds), default=0)
    drafted = [[round_ for round_ in rounds if round_.num_drafted > i] for i in range(longest)]
    return [sum(round_.num_accepted > i for round_ in those) / len(those) for i, those in enumerate(drafted)]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed over that of each of BASES, by wall clock and by CPU seconds, and how many first tokens equal full's."""
    bases = {row["name"]: row for row in rows if row["name"] in BASES}
    for row in rows:
        for name, base in bases.items():
            row[f"ratio_to_{name}"] = row["tokens_per_second"] / base["tokens_per_second"]
            row[f"cpu_ratio_to_{name}"] = row["tokens_per_cpu_second"] / base["tokens_per_cpu_second"]
        if "full" in bases:
            row["tokens_as_full"] = min(map(first_difference, row["token_ids"], bases["full"]["token_ids"]))
    return rows


def first_difference(tokens: list[int], others: list[int]) -> int:
    """How many tokens are the same before two differ, or one text ends."""
    pairs = list(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def over_prompts(by_prompt: list[list[Row]]) -> list[Row]:
    """Each system's figures over several prompts: the median of a number, of ratios too, and the outermost extremes.

    What is no single number (a text, a list) stands with each prompt alone.
    """
    if len(by_prompt) == 1:
        return by_prompt[0]
    combined = []
    for rows in zip(*by_prompt, strict=True):
        combined.append({key: _over_prompts(key, [row[key] for row in rows]) for key in rows[0] if key in rows[-1]})
    return [{key: value for key, value in row.items() if value is not LEFT_OUT} for row in combined]


def _over_prompts(key: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {inner: median(x[inner] for x in values) for inner in first if all(inner in x for x in values)}
    if any(type(value) not in (int, float) for value in values):
        return first if all(value == first for value in values) else LEFT_OUT
    return (min if key.endswith("_min") else max if key.endswith("_max") else median)(values)


def headline(rows: list[dict[str, Any]], chosen: Policy, speculation: str) -> dict[str, Any]:
    """The figures at the top of the record: those of the run's own policy and speculation, if it was measured."""
    name = chosen.name + {"draft": SPECULATES, "adaptive": ADAPTS}.get(speculation, "")
    own = next((row for row in rows if row["name"] == name), {"name": None})
    return {key: value for key, value in own.items() if key not in ("name", "policy", "kv_budget", "num_draft_tokens")}
