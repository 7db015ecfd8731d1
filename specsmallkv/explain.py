"""One sentence for every mistake of the user's: what is wrong, with its value, and the remedy.

Hydra and OmegaConf explain in several lines, and with remedies (`+key=`) that a typed schema refuses. Their
exceptions are told apart here by type and, where one type serves several mistakes, by message; a message that
is not known here is folded into one line. What is no mistake of the user's gets None and keeps its traceback.
"""

import difflib
import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import TracebackType
from typing import Any

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from .config import CONFIG_DIR, ModelConfig, RunConfig, SpeculationConfig, option
from .errors import UserError
from .memory import is_out_of_memory, shortage

TYPED_GROUPS = {"model": ModelConfig, "speculation": SpeculationConfig}
PROPER_GROUPS = ("policy", "speculation", "task")  # they hold a choice: group=option, without a plus
LESS_MEMORY = (
    "lower max_new_tokens or policy.kv_budget, shorten the prompt, lower batch_size, or use model.dtype=bfloat16 or a "
    "smaller model"
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "text or a list [a,b]",
}


def explain(error: BaseException) -> str | None:
    sentence = _sentence(error)
    return sentence if sentence is None or sentence.endswith((".", "?")) else f"{sentence}."


def _sentence(error: BaseException) -> str | None:
    for cause in _chain(error):
        if isinstance(cause, UserError):
            return _one_line(str(cause))
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return unknown_key(str(cause.full_key))
        if isinstance(cause, ValidationError):
            return _wrong_type(cause, str(error))
        if is_out_of_memory(cause):
            return f"{shortage(cause)}; {LESS_MEMORY}"
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, InstantiationException):
        return _not_built(error)
    if isinstance(error, OmegaConfBaseException):  # an interpolation or a missing value
        return _no_value(error)
    if isinstance(error, HydraException):
        return _composition(str(error))
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the space left there"
    if getattr(error, "errno", None) in DISK_FULL or "os error 28" in str(error):  # safetensors has only the text
        return "the disk is full (No space left on device); free some, or write elsewhere, e.g. run_dir=DIR"
    if str(error).startswith("Config group override must be"):  # `policy=3`, `model=null`
        return f"a group takes the name of one of its options, as in policy=full ({_one_line(str(error))})"
    if isinstance(error, ValueError) and _raised_in(error.__traceback__).startswith(("hydra.", "logging.config")):
        return f"Hydra refuses this ({_one_line(str(error)).rstrip('.')}); --hydra-help lists its flags"
    return None


def unknown_argument(argument: str) -> str:
    """An argument that is neither key=value nor one of Hydra's flags."""
    key, _, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and key in known_keys():
        return f"{argument} is not a flag; write {key}={value or 'VALUE'}"
    if argument.startswith("-"):
        return f"{argument} is not a flag; write settings as key=value, --help lists them"
    return f"{argument!r} is not key=value; put quotes around text that has spaces, as in 'prompt=some words'"


def unknown_key(key: str) -> str:
    group, dot, leaf = key.rpartition(".")
    if group.partition(".")[0] == "hydra":
        return f"{key} is not a key of Hydra's own; --cfg hydra shows them"
    if key in known_keys():  # of another option of its group
        options = [file.stem for file in sorted((CONFIG_DIR / group).glob("*.yaml")) if leaf in option(file)]
        return f"{key} is no setting of the chosen {group}; it belongs to {group}={'|'.join(options)}"
    siblings = [known for known in known_keys() if known.startswith(group + dot)] or list(known_keys())
    # By last name, so that `kv_budget` finds `policy.kv_budget`; of two with one name the first stands.
    by_leaf = {known.rpartition(".")[2]: known for known in reversed(siblings)}
    close = difflib.get_close_matches(leaf, by_leaf, n=1)
    if close:
        return f"{key} is not a key; did you mean {by_leaf[close[0]]}?"
    return f"{key} is not a key; " + (f"known: {', '.join(siblings)}" if dot else "--help lists them all")


def refuse_unknown_keys(composed: DictConfig) -> None:
    """`+key=` opens a typed schema; without this the key would be dropped in silence."""
    for group, schema in {"": RunConfig, **TYPED_GROUPS}.items():
        known = {field.name for field in fields(schema)}
        for key in map(str, composed[group] if group else composed):
            if key not in known:
                raise UserError(unknown_key(f"{group}.{key}".lstrip(".")))


def refuse_several_options(choices: Mapping[str, Any]) -> None:
    """Hydra would merge the options of `policy=[full,snapkv]`, which then has no choice, and run the mixture."""
    for group in PROPER_GROUPS:
        if not isinstance(choices.get(group), str):
            raise UserError(f"{group}=[...] mixes several options; name one, or run each of a list: -m {group}=A,B.")


@cache
def known_keys() -> tuple[str, ...]:
    keys = [field.name for field in fields(RunConfig)]
    for group, schema in TYPED_GROUPS.items():
        keys += [f"{group}.{field.name}" for field in fields(schema)]
    for group in ("policy", "task"):
        for file in sorted((CONFIG_DIR / group).glob("*.yaml")):
            keys += [f"{group}.{key}" for key in map(str, option(file))]
    return tuple(dict.fromkeys(keys))


def _unknown_option(error: MissingConfigException) -> str:
    if error.missing_cfg_file is None:
        return "the directory of --config-path does not exist; leave --config-name and --config-path out"
    if not error.options:
        return f"config {error.missing_cfg_file} does not exist; leave --config-name and --config-path out"
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    close = difflib.get_close_matches(option, error.options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    plus = "+" if group in ("model", "experiment") else ""
    return f"{plus}{group}={option} does not exist; {hint}known: {', '.join(error.options)}"


def _wrong_type(cause: ValidationError, message: str) -> str:
    key = str(cause.full_key)
    override = re.search(r"Error merging override (.*)", message, re.DOTALL)
    kind = _kind(key)
    return f"{override[1] if override else key} is not possible; {key} takes {kind or 'another type'}"


def _kind(key: str) -> str | None:
    group, _, name = key.rpartition(".")
    schema = TYPED_GROUPS.get(group) if group else RunConfig
    types = {field.name: field.type for field in fields(schema)} if is_dataclass(schema) else {}
    for plain, kind in KINDS.items():
        if types.get(name) in (plain, plain | None):
            return kind
    return None


def _no_value(error: OmegaConfBaseException) -> str:
    message = str(error).splitlines()[0]
    group = re.search(rf"mandatory value: ({'|'.join(PROPER_GROUPS)})$", message)
    if group:
        return f"{group[1]} has no option; choose one with {group[1]}=NAME"
    return f"{error.full_key}: {message}; give it a value"


def _unreadable(override: str) -> str:
    key = override.partition("=")[0]
    return f"{_one_line(override)} cannot be read; quote its value once for Hydra: '{key}=\"...\"'"


def _not_built(error: InstantiationException) -> str | None:
    unexpected = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unexpected:
        ours = "target 'specsmallkv." in str(error)
        remedy = (
            "leave it out" if ours else "leave it out, or make the class a dataclass below Policy and use policy=full"
        )
        return f"{unexpected[2]} is not a parameter of {unexpected[1]}; {remedy}"
    missing = re.search(r"(\w+)\.__init__\(\) missing .*: (.*)\"", str(error))
    if missing:
        return f"{missing[1]} needs {missing[2]}; set it in the option's file, or with +policy.KEY= or +task.KEY="
    if isinstance(error.__cause__, ImportError) or "locating target" in str(error):
        target = re.search(r"target '([^']*)'", str(error))
        reason = _one_line(str(error.__cause__)).partition(" Are you sure")[0]
        return f"_target_={target[1] if target else '?'} cannot be imported ({reason}); name a module.Class"
    return None


def _composition(message: str) -> str:
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'\n1\.", message, re.DOTALL)
    if ambiguous:
        return f"{_one_line(ambiguous[1])} gives several values; add -m to run each of them"
    no_choice = re.search(r"To append to your default list use (\S+)", message)
    if no_choice:
        return f"{no_choice[1].lstrip('+')} needs a plus: write {no_choice[1]}"
    forced = re.match(r"force-add of config groups is not supported: '\+(.*)'", message)
    if forced:
        return f"+{forced[1]} has a plus too many: write {forced[1]}"
    twice = re.match(r"Multiple values for (\w+)\. To override a value use 'override \w+: (.*)'", message)
    if twice and twice[1] in PROPER_GROUPS:
        return f"+{twice[1]}={twice[2]} must not have a plus: write {twice[1]}={twice[2]}"
    if twice:
        return f"+{twice[1]}={twice[2]} is a second choice of {twice[1]}; keep one of them"
    deleted = re.match(r"Error merging override ~(\S+)|Could not delete from config\. '(.*)' does not exist", message)
    if deleted:
        return f"~{deleted[1] or deleted[2]} removes what must stay or is not there; leave it out, or set KEY=null"
    return _one_line(message.split("\nSee https")[0])


def _raised_in(frame: TracebackType | None) -> str:
    """The module that raised."""
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "") if frame else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(text: str) -> str:
    return " ".join(text.split())
