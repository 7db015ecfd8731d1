"""A sweep (`-m`): which of its points an earlier one has finished, where a record goes, and how far the whole is.

A sweep into a directory that is named (`hydra.sweep.dir=DIR`) goes on where an earlier one stopped: a point is done if
any record in that directory has its configuration's hash and tells of no error. Records are written whole or not at
all, so a kill loses the point in work and nothing else.
"""

import json
import math
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

HYDRAS_OWN = {".hydra", "multirun.yaml"}
FAILED = ".failed"  # directory in a sweep's, with an empty file for each of its points that failed


@dataclass
class Sweep:
    """One process's sweep. total: its points, None if they cannot be counted; known: records by hash, once read.

    known belongs to one start of one sweep's directory: a launcher's process may live through several.
    elsewhere: points ran in other processes, of which this one sees the failed ones' marks. directory: of the records.
    """

    total: int | None = None
    ended: int = 0
    skipped: int = 0
    failed: int = 0
    started: float = field(default_factory=time.perf_counter)
    known: dict[str, Path] = field(default_factory=dict)
    known_of: tuple[Path, int] | None = None
    elsewhere: bool = False
    directory: Path | None = None

    def finished(self, directory: Path, config_hash: str) -> Path | None:
        """The record of this configuration in the sweep's directory, if there is one."""
        begun = directory / "multirun.yaml"  # Hydra writes it at each start
        this = directory, begun.stat().st_mtime_ns if begun.exists() else 0
        if self.known_of != this:
            records = {path: read_record(path) for path in sorted(directory.rglob("record.json"))}
            self.known = {r["config_hash"]: path for path, r in records.items() if is_finished(r)}
            self.known_of = this
        return self.known.get(config_hash)

    def fail(self, directory: Path) -> None:
        """Count a failed point, and leave a mark of it for a launcher's first process."""
        self.failed += 1
        with suppress(OSError):  # a full disk: the error itself is reported in any case
            marks = directory / FAILED
            marks.mkdir(parents=True, exist_ok=True)
            (marks / uuid4().hex).touch()

    def gather(self, directory: Path) -> None:
        """Where points ran in other processes: how many failed."""
        self.elsewhere, self.ended = True, self.total or 0
        self.failed = len(list((directory / FAILED).glob("*")))

    def line(self) -> str:
        """`3 of 12 points, 1 of them done before, 1 failed; 0:00:42 gone, about 0:02:06 to go`."""
        here = "points in other processes" if self.elsewhere else f"{self.ended} points of this process"
        counted = f"{self.ended} of {self.total} points" if self.total else here
        done_before = f", {self.skipped} of them done before" if self.skipped else ""
        failed = f", {self.failed} failed" if self.failed else ""
        gone = time.perf_counter() - self.started
        run, left = self.ended - self.skipped, (self.total or 0) - self.ended
        to_go = f", about {duration(gone / run * left)} to go" if run and left > 0 else ""
        return f"{counted}{done_before}{failed}; {duration(gone)} gone{to_go}"


current = Sweep()


class Progress(Callback):
    """Hydra's callback (conf/config.yaml): counts the points and tells after each how far the sweep is.

    A launcher's processes tell of their own points, and the first one at the end of all.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global current
        current = Sweep(directory=Path(config.hydra.sweep.dir))
        current.total = count_points(config)
        shutil.rmtree(Path(config.hydra.sweep.dir) / FAILED, ignore_errors=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        if not current.ended:
            current.gather(directory)
            if not config.quiet:
                print(current.line(), file=sys.stderr, flush=True)
        shutil.rmtree(directory / FAILED, ignore_errors=True)

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


def forget(directory: Path) -> None:
    """Remove the directory of a run if there is nothing in it but what Hydra wrote ahead of that run."""
    with suppress(OSError):
        if {path.name for path in directory.iterdir()} <= HYDRAS_OWN:
            shutil.rmtree(directory / ".hydra", ignore_errors=True)
            (directory / "multirun.yaml").unlink(missing_ok=True)
            directory.rmdir()  # fails if another process has put something there meanwhile


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
