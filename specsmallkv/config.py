"""The structured schema of a run and the checks that need no model.

Hydra fills these dataclasses from `conf/`, so a mistyped key or a wrong type is refused at composition.
`check` refuses values that would only fail later. `option` reads one file of conf/. Nothing here knows
the command line or loads a model.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from .errors import UserError

PACKAGE = Path(__file__).resolve().parent
DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTIONS = ("auto", "sdpa", "reference", "flash", "triton")
LINEARS = ("auto", "torch", "packed", "blocked")
COMPILES = ("default", "reduce-overhead")
SPECULATIONS = ("draft", "adaptive", "none")
SMALLEST_VIEW = 16
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?|tensor_parallel")
CONFIG_DIR = next((path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()), PACKAGE / "conf")
PROMPT_SOURCES = ("prompt", "prompt_file", "messages_file", "prompts_file")
Rule = tuple[bool, str, object, str]  # valid?, key, value, remedy


# OmegaConf reads Optional[...] where the rest of the package writes `| None`.
@dataclass
class ModelConfig:
    name: str  # what records and run directories call the pair
    target: str  # source string of the large model
    draft: Optional[str]  # source string of the small model; None: there is none
    dtype: str  # auto: bfloat16 where it is fast, else float32
    device: str
    attention: str
    head_map: Optional[str] = None  # file of a saved head map; None: fitted on each prompt alone
    head_map_check: bool = True  # refuse a map whose fingerprints are of other weights
    linear: str = "auto"  # how weights lie in memory: torch's way, or a CPU kernel's
    draft_vocab_size: int = 0  # tokens that a draft with a full head proposes besides those in its context; 0: all
    compile: Optional[str] = None  # torch.compile's mode for short passes; None: eager
    draft_bits: Optional[int] = None  # in which the draft's layers hold their weights, 4; None: as they come


@dataclass
class SpeculationConfig:
    name: str
    num_draft_tokens: int = 3
    adaptive: bool = False
    cost_table: Optional[str] = None  # record of an adaptive run; None: measured
    oracle_every: int = 1
    draft_view_size: int = 512  # tokens of its own long cache that the draft's steps read; 0: all


@dataclass
class RunConfig:
    model: ModelConfig
    policy: Any
    speculation: SpeculationConfig
    task: Any
    prompt: Optional[str] = None  # the prompt itself; with no source given, a built-in long document
    prompt_file: Optional[str] = None  # one prompt, UTF-8 text
    messages_file: Optional[str] = None  # one conversation: a JSON list of {"role", "content"}
    prompts_file: Optional[str] = None  # several: JSONL rows {"prompt": ...} or {"messages": [...]}
    chat: Optional[bool] = None  # apply the chat template; None: if the tokenizer has one
    batch_size: int = 1  # prompts of a prompts_file that are answered at once
    max_new_tokens: int = 128
    ignore_eos: bool = False  # go on after an end-of-sequence token, for measuring
    stop: list[str] = field(default_factory=list)  # strings that end the text
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    report: bool = False  # an HTML page of this run beside its record, and the trace
    trace: bool = False  # a JSONL row per round beside the record
    quiet: bool = False  # no live status and no table on stderr
    resume: bool = True  # in a sweep, leave out points that have a record in hydra.sweep.dir
    run_dir: Optional[str] = None  # where the record goes; None: Hydra's directory of the run


ConfigStore.instance().store(name="run_schema", node=RunConfig)


def check(config: RunConfig) -> None:
    """Raise a UserError for the first value that no run can use; warn of one that this run does not use."""
    check_model_settings(config.model)
    _refuse(_run_rules(config))
    _check_combinations(config)
    _warn_of_greedy_sampling(config)


def check_model_settings(model: ModelConfig) -> None:
    """Raise a UserError for the first setting that no pair of models can have."""
    _refuse(_model_rules(model))


def _refuse(rules: Iterator[Rule]) -> None:
    for valid, key, value, remedy in rules:
        if not valid:
            raise UserError(f"{key}={value!r} is not possible; {remedy}.")


def _model_rules(model: ModelConfig) -> Iterator[Rule]:
    yield bool(model.name.strip()), "model.name", model.name, "give the pair a name"
    yield bool(model.target.strip()), "model.target", model.target, "name a hub id or a local directory"
    yield model.dtype in DTYPES, "model.dtype", model.dtype, f"use {', '.join(DTYPES)}"
    yield model.attention in ATTENTIONS, "model.attention", model.attention, f"use {', '.join(ATTENTIONS)}"
    yield model.linear in LINEARS, "model.linear", model.linear, f"use {', '.join(LINEARS)}"
    size = model.draft_vocab_size
    yield size >= 0, "model.draft_vocab_size", size, "use 0 (all tokens) or a number of tokens, e.g. 32768"
    yield model.draft_bits in (None, 4), "model.draft_bits", model.draft_bits, "use null (as they come) or 4"
    known_mode = model.compile is None or model.compile in COMPILES
    yield known_mode, "model.compile", model.compile, f"use null (off), {' or '.join(COMPILES)}"
    known_device = DEVICE.fullmatch(model.device) is not None
    yield known_device, "model.device", model.device, "use auto, cpu, mps, cuda, cuda:N or tensor_parallel"


def _run_rules(config: RunConfig) -> Iterator[Rule]:
    name, num = config.speculation.name, config.speculation.num_draft_tokens
    yield name in SPECULATIONS, "speculation.name", name, f"use {', '.join(SPECULATIONS)}"
    enough = num >= (0 if name == "none" else 1)
    yield enough, "speculation.num_draft_tokens", num, "use 1 or more, or set speculation=none"
    every, adaptive = config.speculation.oracle_every, config.speculation.adaptive
    yield every >= 1, "speculation.oracle_every", every, "use 1 (every round) or more"
    size = config.speculation.draft_view_size
    yield (
        size == 0 or size >= SMALLEST_VIEW,
        "speculation.draft_view_size",
        size,
        f"use 0 (off), or {SMALLEST_VIEW} or more",
    )
    possible = not adaptive or name != "none"
    yield (
        possible,
        "speculation.adaptive",
        adaptive,
        "nothing is drafted with speculation=none; use speculation=adaptive",
    )
    table = config.speculation.cost_table
    yield adaptive or table is None, "speculation.cost_table", table, "set speculation=adaptive, which reads it"
    yield config.max_new_tokens >= 1, "max_new_tokens", config.max_new_tokens, "use 1 or more"
    yield config.batch_size >= 1, "batch_size", config.batch_size, "use 1 or more"
    temperature = config.temperature
    yield 0 <= temperature < math.inf, "temperature", temperature, "use 0 (greedy) or a positive number"
    yield 0 < config.top_p <= 1, "top_p", config.top_p, "use a number in (0, 1]; 1 turns it off"
    yield config.top_k >= 0, "top_k", config.top_k, "use a positive number, or 0 to turn it off"
    yield 0 <= config.seed < 2**63, "seed", config.seed, "use a number from 0 to 2**63 - 1"
    yield all(config.stop), "stop", config.stop, "leave the empty string out"
    if config.prompt is not None:
        yield bool(config.prompt.strip()), "prompt", config.prompt, "type some text, or leave it out"
        yield _is_text(config.prompt), "prompt", config.prompt, "give UTF-8 text"


def _check_combinations(config: RunConfig) -> None:
    given = [name for name in PROMPT_SOURCES if getattr(config, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given together; keep one of them.")
    if config.messages_file is not None and config.chat is False:
        raise UserError("chat=false leaves the messages_file without the template it needs; drop one of them.")
    task = config.task.get("name") if isinstance(config.task, Mapping) else None
    for key in ("report", "trace"):
        if getattr(config, key) and task != "generate":
            raise UserError(
                f"{key}=true shows a run of task=generate; for other records use task=report task.dir=DIR."
            )
        if getattr(config, key) and config.batch_size > 1:
            raise UserError(
                f"{key}=true shows prompts that are answered one by one, not batch_size={config.batch_size}; "
                "drop one of them."
            )


def _warn_of_greedy_sampling(config: RunConfig) -> None:
    for key, off in (("top_p", 1), ("top_k", 0)):
        if config.temperature == 0 and getattr(config, key) != off:
            told = f"{key}={getattr(config, key)} has no effect at temperature=0, which is greedy; set temperature."
            warnings.warn(told, stacklevel=3)


def _is_text(value: str) -> bool:
    """False for what the shell handed over as bytes that are no UTF-8 (lone surrogates)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def option(file: Path) -> Any:
    """What a file of conf/ says, laid over the options of the same group that its `defaults` name."""
    own: Any = OmegaConf.load(file)
    bases = [option(file.with_name(f"{base}.yaml")) for base in own.pop("defaults", ()) if base != "_self_"]
    return OmegaConf.merge(*bases, own)
