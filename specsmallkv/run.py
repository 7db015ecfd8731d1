"""The entry point: configuration -> objects -> task -> record. Only this file, `cli.py` and `sweep.py` know Hydra.

    python -m specsmallkv.run [KEY=VALUE ...]      or the console script `specsmallkv`, from any directory

stdout carries the text and, as its last line, the JSON record; everything else goes to stderr. Exit codes: 0,
1 (a bug, or a point of a sweep that failed in another process), 2 (the user's mistake), 130 (Ctrl-C). In a sweep every
point runs that has no record yet; one that fails leaves a record with its error and makes the exit non-zero.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import sweep
from .cli import quote, reported, run_command_line
from .config import CONFIG_DIR, RunConfig, check
from .errors import UserError
from .explain import explain, refuse_several_options, refuse_unknown_keys
from .memory import reset_peak_memory
from .record import asked_for, complete, config_hash, failure, finite, write_record


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def run(composed: DictConfig) -> None:
    point = _point()
    with reported(point):
        try:
            record = execute(composed) if point is None else execute_point(composed)
        except Exception as error:
            if point is None:
                if explain(error) is not None:  # a bug's configuration is worth keeping
                    sweep.forget(Path(HydraConfig.get().runtime.output_dir))
            elif not isinstance(error, BrokenPipeError):
                record_failure(composed, error)
            raise
        if point is None and composed.run_dir is not None:
            sweep.forget(Path(HydraConfig.get().runtime.output_dir))
        if record["interrupted"]:
            raise KeyboardInterrupt


def execute(composed: DictConfig) -> dict[str, Any]:
    """One run: the task's record, completed with what every record holds, printed and written."""
    config, plain = to_objects(composed)
    record = complete(plain["task"].get("name"), run_task(config), config) | identity(plain)
    write_record(record, str(config.run_dir))
    return record


def execute_point(composed: DictConfig) -> dict[str, Any]:
    """A point of a sweep: the record of an earlier sweep into the same directory, if there is one, else a run."""
    plain = resolved(composed)
    directory = Path(HydraConfig.get().sweep.dir)
    path = sweep.current.finished(directory, config_hash(plain)) if composed.resume else None
    if path is None:
        return execute(composed)
    sweep.current.skipped += 1
    if not composed.quiet:
        print(f"{_point()}: done before, {path}", file=sys.stderr)
    print(path.read_text(encoding="utf-8").rstrip("\n"), flush=True)
    return {"interrupted": False}


def record_failure(composed: DictConfig, error: Exception) -> None:
    """So that a sweep's records tell of every point."""
    sweep.current.fail(Path(HydraConfig.get().sweep.dir))
    plain, settings = {}, {}
    with suppress(OmegaConfBaseException):  # what cannot be resolved has no hash; its error says why
        plain = resolved(composed)
        settings = asked_for(cast(RunConfig, composed)) | identity(plain)
    record = failure(plain, settings, explain(error) or f"{type(error).__name__}: {error}")
    with suppress(UserError):  # the disk may be full: the error itself is reported in any case
        write_record(record, run_directory(record["config_hash"]))


def identity(plain: dict[str, Any]) -> dict[str, Any]:
    """What tells this run from others."""
    overrides = list(HydraConfig.get().overrides.task)
    return {"config": finite(plain), "config_hash": config_hash(plain), "overrides": overrides}


def run_directory(hash_: str | None) -> Path:
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    return output_dir if _point() is None or hash_ is None else sweep.directory_of(output_dir, hash_)


def refuse_one_directory(run_dir: str | None) -> None:
    if run_dir is not None and _point() is not None:
        raise UserError(f"run_dir={run_dir} is one place for all points of a sweep; set hydra.sweep.dir=DIR instead.")


def resolved(composed: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def run_task(config: RunConfig) -> dict[str, Any]:
    """What the task has to tell; if Ctrl-C ends it without a word of its own, what was asked for."""
    settings = asked_for(config)
    try:
        from . import tensor_parallel
        from .presets import build  # with torch behind it, which takes seconds: Ctrl-C shall find a run to record

        task, config.policy = build(config.task, "task"), build(config.policy, "policy")
        refuse_unused_batch_size(task, config)
        tensor_parallel.check_run(config, getattr(task, "name", ""), _point() is not None)
        reset_peak_memory()
        return task.run(config)
    except KeyboardInterrupt:
        return settings | {"interrupted": True}


def refuse_unused_batch_size(task: Any, config: RunConfig) -> None:
    if config.batch_size != 1 and not getattr(task, "uses_batch_size", False):
        raise UserError(
            f"batch_size={config.batch_size} changes nothing in task={task.name}; leave it out, or use task=generate."
        )


def to_objects(composed: DictConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The checked configuration as dataclasses, and the same as plain data for the record."""
    refuse_unknown_keys(composed)
    refuse_several_options(HydraConfig.get().runtime.choices)
    config = cast(RunConfig, OmegaConf.to_object(composed))
    plain = resolved(composed)
    refuse_one_directory(config.run_dir)
    config.run_dir = config.run_dir or str(run_directory(config_hash(plain)))
    check(config)
    return config, plain


def _point() -> str | None:
    """What a sweep calls the present point; None in a single run."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return None
    return f"point {job.job.num} ({' '.join(job.overrides.task)})"


def main(argv: list[str] | None = None) -> int:
    if os.getcwd() not in sys.path:  # `python -m` does it too: a policy of the user's own lies there
        sys.path.append(os.getcwd())
    if sys.stdout is None:  # closed by the shell (`>&-`): the record still goes to the run directory
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that cannot show a character shows a question mark
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # not the line of code that warns
    sweep.current = sweep.Sweep()
    with one_voice() as silenced:
        code = run_command_line(run, [*(sys.argv[1:] if argv is None else argv), *silenced])
    if code and not sweep.current.ended and sweep.current.directory is not None:
        sweep.forget(sweep.current.directory)
    return code or int(sweep.current.elsewhere and sweep.current.failed > 0)


@contextmanager
def one_voice() -> Iterator[list[str]]:
    """Of processes that share a target (`tensor_parallel.py`) the first speaks; what the others would leave is lost.

    Yields the overrides that see to it.
    """
    try:
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
            yield []
            return
        with TemporaryDirectory() as nowhere, open(os.devnull, "w") as silent, redirect_stdout(silent):
            yield [f"hydra.run.dir={quote(nowhere)}", "hydra.output_subdir=null", "run_dir=null", "quiet=true"]
    finally:
        if "torch" in sys.modules:
            from . import tensor_parallel

            tensor_parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
