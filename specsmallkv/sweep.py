"""A sweep (`-m`): which of its points an earlier one has finished, where a record goes, and how far the whole is.

A sweep into a directory that is named (`hydra.sweep.dir=DIR`) goes on where an earlier one stopped: a point is done if
any record in that directory has its configuration's hash and tells of no error. Records are written whole or not at
all, so a kill loses the point in work and nothing else.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

CLOCK_TICK = 0.1  # s; file times are coarser than the clock


@dataclass
class Sweep:
    """One process's sweep. total: its points, None if they cannot be counted; known: records by hash, once read.

    began: wall-clock time, beside which records of points that ran in other processes are told from older ones.
    """

    total: int | None = None
    ended: int = 0
    skipped: int = 0
    failed: int = 0
    started: float = field(default_factory=time.perf_counter)
    began: float = field(default_factory=time.time)
    known: dict[str, Path] | None = None
    elsewhere: bool = False

    def finished(self, directory: Path, config_hash: str) -> Path | None:
        """The record of this configuration in the sweep's directory, if there is one."""
        if self.known is None:
            records = {path: read_record(path) for path in sorted(directory.rglob("record.json"))}
            self.known = {r["config_hash"]: path for path, r in records.items() if is_finished(r)}
        return self.known.get(config_hash)

    def gather(self, directory: Path) -> None:
        """Points ran in other processes (a launcher's): how many failed is what their records say."""
        self.elsewhere, self.ended = True, self.total or 0
        written = [path for path in directory.rglob("record.json") if path.stat().st_mtime >= self.began - CLOCK_TICK]
        self.failed = sum(read_record(path).get("error") is not None for path in written)

    def line(self) -> str:
        """`3 of 12 points, 1 of them done before, 1 failed; 0:00:42 gone, about 0:02:06 to go`."""
        counted = f"{self.ended} of {self.total} points" if self.total else f"{self.ended} points of this process"
        done_before = f", {self.skipped} of them done before" if self.skipped else ""
        failed = f", {self.failed} failed" if self.failed else ""
        gone = time.perf_counter() - self.started
        run, left = self.ended - self.skipped, (self.total or 0) - self.ended
        to_go = f", about {duration(gone / run * left)} to go" if run and left > 0 else ""
        return f"{counted}{done_before}{failed}; {duration(gone)} gone{to_go}"


current = Sweep()


class Progress(Callback):
    """Hydra's callback (conf/config.yaml): counts the points and tells after each how far the sweep is."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global current
        current = Sweep(count_points(config))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not current.ended:
            current.gather(Path(config.hydra.sweep.dir))
            if not config.quiet:
                print(current.line(), file=sys.stderr, flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode and config.hydra.mode.name == "MULTIRUN":
            current.ended += 1
            if not config.quiet:
                print(current.line(), file=sys.stderr, flush=True)


def count_points(config: DictConfig) -> int | None:
    """The product over the keys; None if a value is a range without steps, which only other sweepers know."""
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    sizes: dict[str, int] = {}
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # `${...}` is each point's own
    for override in parser.parse_overrides([*given, *cast(list[str], typed)]):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            return None
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override]
        sizes[override.get_key_element()] = len(list(values))
    return math.prod(sizes.values())


def directory_of(output_dir: Path, config_hash: str) -> Path:
    """Where a point's record goes: Hydra's directory, or one beside it if that holds another configuration's.

    Points are numbered, so a sweep that got another value gives some of them the numbers of others.
    """
    there = read_record(output_dir / "record.json").get("config_hash", config_hash)
    return output_dir if there == config_hash else output_dir.with_name(f"{output_dir.name}-{config_hash}")


def is_finished(record: dict[str, Any]) -> bool:
    return "config_hash" in record and not record.get("interrupted") and record.get("error") is None


def read_record(path: Path) -> dict[str, Any]:
    """Empty if there is none or it cannot be read: then it is no reason to leave a point out."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
