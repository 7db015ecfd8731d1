r"""The two ends of the command line: arguments before Hydra reads them, errors after it.

Hydra's grammar gives a meaning to commas, quotes, brackets and `${...}`, so free text is quoted here first:

    prompt=ANYTHING   the prompt is exactly what follows the equal sign: `prompt=null` is the word null; `task.system=`
                      likewise, but for `null`
    stop=ANYTHING     one stop string, exactly: `stop=[INST]` is `[INST]`; but a Hydra list that shows a comma
                      or quotes is several, as in `stop=[a,b]` or `stop=["[END]"]`, and `stop=[]` is none
    *_file= *_path= *_dir= model.target= model.draft= and the other paths of PATH_KEY
                      a path, exactly; `null`, a value in quotes and, with -m, a list a,b are left to Hydra

`+experiment=NAME` goes behind `+model=NAME`, wherever it was typed: what it says of the model holds for any.

Only `???` alone cannot be typed: it is OmegaConf's mark of a missing value and knows no escape.
A sweep over prompts is a `prompts_file`. No key is understood here; `explain.py` words the errors.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.main import get_args_parser

from .errors import UserError
from .explain import explain, unknown_argument

OVERRIDE = re.compile(r"(?P<key>[+~]{0,2}\w[\w./@:-]*)=(?P<value>.*)", re.DOTALL)
PATH_KEY = re.compile(
    r".*_(file|path|dir)|model\.(target|draft|head_map)|task\.(dir|output|start_from)|speculation\.cost_table"
)
USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
_failed_points: list[int] = []  # exit codes of the points of this sweep that failed


def prepare_arguments(argv: list[str]) -> list[str]:
    """Free text quoted, mistyped flags refused, overrides before flags: argparse wants them in one piece."""
    overrides = [argument for argument in argv if OVERRIDE.match(argument) or argument.startswith("~")]
    flags = [argument for argument in argv if argument not in overrides]
    overrides.sort(key=lambda override: override.startswith("+experiment="))  # Hydra lets the later of two groups win
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        known, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --hydra-help lists the flags.") from None
    if unknown or known.overrides:
        raise UserError(unknown_argument((unknown + known.overrides)[0]))
    return [quote_override(override, known.multirun) for override in overrides] + flags


def quote_override(override: str, multirun: bool = False) -> str:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        return override
    key, value = match["key"].lstrip("+"), match["value"]
    if key == "prompt" or (key == "task.system" and value != "null"):
        quoted = quote(value)
    elif key == "stop":
        quoted = "[" + ",".join(quote(text) for text in stop_strings(value)) + "]"
    elif PATH_KEY.fullmatch(key) and not _left_to_hydra(value, multirun):
        quoted = quote(value)
    else:
        return override
    return f"{match['key']}={quoted}"


def quote(text: str) -> str:
    """A value that arrives as exactly this text: quotes escaped for Hydra, interpolations for OmegaConf."""
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


def stop_strings(value: str) -> list[str]:
    if value in ("", "[]"):
        return []
    if not (value.startswith("[") and value.endswith("]") and re.search("[,'\"]", value)):
        return [value]
    try:
        elements = OverridesParser.create().parse_override(f"stop={value}").value()
    except HydraException:
        return [value]
    if not isinstance(elements, list) or any(isinstance(element, list | dict) for element in elements):
        return [value]
    return [str(element) for element in elements]


def _left_to_hydra(value: str, multirun: bool) -> bool:
    in_quotes = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    return value == "null" or in_quotes or (multirun and "," in value)


def run_command_line(entry: Callable[[], object], argv: list[str]) -> int:
    """Run a `hydra.main` entry on these arguments; returns the exit code, in a sweep the first failed point's."""
    _failed_points.clear()
    try:
        if "--version" in argv:
            print(f"specsmallkv {version('specsmallkv')}")
            return 0
        with _hydra_reads(prepare_arguments(argv)):
            entry()
    except SystemExit as finished:  # a job's exit code, or Hydra's after --help
        return int(finished.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _stdout_is_gone()
    except Exception as error:
        return _report(error, None)
    return _failed_points[0] if _failed_points else 0


@contextmanager
def _hydra_reads(argv: list[str]) -> Iterator[None]:
    """What Hydra takes from the process: the arguments, and the wish that errors be raised, not printed."""
    saved = sys.argv
    sys.argv = [sys.argv[0], *argv]
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            yield
    finally:
        sys.argv = saved


@contextmanager
def reported(point: str | None) -> Iterator[None]:
    """Report what goes wrong inside a job: a single run exits; a sweep, whose `point` has a name, goes on.

    Hydra gets no exception of a point: it would print it again, and keep it, its frames and so the models alive.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BrokenPipeError:
        raise SystemExit(_stdout_is_gone()) from None
    except Exception as error:
        code = _report(error, point)
        if point is None:
            raise SystemExit(code) from None
        _failed_points.append(code)


def _stdout_is_gone() -> int:
    """The reader has left (`| head`); without this the interpreter's own flush at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _report(error: Exception, point: str | None) -> int:
    sentence = explain(error)
    if sentence is None:
        traceback.print_exc()
        return 1
    print(f"{point}: {sentence}" if point else sentence, file=sys.stderr)
    return USER_ERROR
