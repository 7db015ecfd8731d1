"""The record of a run: one JSON document, the last line of stdout and `record.json` in the run directory.

It knows where a record goes and what surroundings every record names; what was measured comes from the task.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import UserError
from .memory import peak_memory_bytes

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "specsmallkv")
# Every record holds these, whatever its task; null where one does not apply.
CONTRACT_KEYS = (
    "schema_version",
    "task",
    "model",
    "policy",
    "kv_budget",
    "speculation",
    "num_draft_tokens",
    "prompt_tokens",
    "new_tokens",
    "text",
    "seconds",
    "ttft_seconds",
    "tokens_per_second",
    "acceptance_rate",
    "acceptance_length",
    "target_kv_bytes",
    "target_kv_allocated_bytes",
    "target_kv_host_bytes",
    "target_kv_bytes_full",
    "scratch_bytes",
    "draft_kv_bytes",
    "draft_weight_bytes",
    "kept_per_layer",
    "recall_bytes",
    "peak_memory_bytes",
    "seed",
    "dtype",
    "device",
    "versions",
    "git_hash",
    "config",
    "config_hash",
    "interrupted",
)
UNHASHED = ("quiet", "resume", "run_dir")  # what a run says and where it goes, not what it is


def complete(task: str | None, outcome: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The task's outcome with what every record holds: the contract's keys, the seed and the surroundings."""
    known = {"schema_version": SCHEMA_VERSION, "task": task, "seed": config.seed, "interrupted": False}
    record = dict.fromkeys(CONTRACT_KEYS) | known | dict(outcome)
    if record["peak_memory_bytes"] is None:
        record["peak_memory_bytes"] = peak_memory_bytes(record["device"])
    return record | environment(record["device"] or "cpu")


def asked_for(config: RunConfig) -> dict[str, Any]:
    """The keys that the configuration alone decides: all that is known of a run that ended before its models came."""
    speculation = config.speculation
    policy = config.policy if isinstance(config.policy, Mapping) else vars(config.policy)
    return {
        "model": config.model.name,
        "policy": policy.get("name"),
        "kv_budget": policy.get("kv_budget"),
        "speculation": speculation.name,
        "num_draft_tokens": 0 if speculation.name == "none" else speculation.num_draft_tokens,
        "dtype": config.model.dtype,
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hex digits that two runs share if their resolved configurations are the same; files are named, not read."""
    relevant = {key: value for key, value in config.items() if key not in UNHASHED}
    return hashlib.sha256(json.dumps(plain(finite(relevant)), sort_keys=True).encode()).hexdigest()[:16]


def finite(config: Any) -> Any:
    """Settings without limit are told as `inf`, which is not null; such figures become null (`plain`)."""
    if isinstance(config, Mapping):
        return {key: finite(value) for key, value in config.items()}
    return "inf" if config in (math.inf, ".inf") else config


def failure(config: Mapping[str, Any], settings: Mapping[str, Any], error: str) -> dict[str, Any]:
    """The record of a run that failed; both mappings are empty where a configuration cannot be resolved."""
    known = {"schema_version": SCHEMA_VERSION, "interrupted": False, "seed": config.get("seed")}
    known |= {"task": config.get("task", {}).get("name"), "error": error}
    return dict.fromkeys(CONTRACT_KEYS) | known | dict(settings) | environment()


def write_record(record: Mapping[str, Any], directory: str | Path) -> None:
    """Write `record.json` (whole or not at all) and print the same document as one line."""
    line = json.dumps(plain(record), allow_nan=False)
    try:
        write_whole(Path(directory) / "record.json", line + "\n")
    except OSError as error:
        raise UserError(f"the record cannot be written to {directory} ({error.strerror}); set run_dir=DIR.") from error
    finally:
        print(line, flush=True)  # the run's outcome is worth showing even where it cannot be kept


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as partial:
        try:
            partial.write(text)
            partial.close()
            os.chmod(partial.name, 0o644)  # a temporary file is private by default; the record is not
            os.replace(partial.name, path)
        except BaseException:
            Path(partial.name).unlink(missing_ok=True)
            raise


def plain(value: Any) -> Any:
    """Data that JSON can hold; a number that is not finite becomes null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # a numpy or torch number or array
        return plain(value.tolist())
    if isinstance(value, Path) or type(value).__module__ == "torch":  # torch.device, torch.dtype
        return str(value).removeprefix("torch.")
    raise TypeError(f"a record cannot hold {value!r} of type {type(value).__name__}")


def environment(device: object = "cpu") -> dict[str, Any]:
    """The surroundings that a number depends on: versions, commit, machine."""
    versions = {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}
    return {"versions": versions, "git_hash": git_hash(), "device_name": device_name(str(device))}


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch  # not needed otherwise, and slow to import

        return torch.cuda.get_device_name(device)
    return _cpu_name()


@cache
def git_hash() -> str | None:
    """The commit of this checkout, with `-dirty` for uncommitted changes; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
