"""Memory of a run: its peak, by the device's allocator on CUDA, else by the process's resident set; and its end.

torch is looked up, not imported: where nothing has imported it yet, it holds no memory.
"""

import gc
import re
import sys
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc/self")  # Linux only
RESET_PEAK = "5"  # what clear_refs takes for "the peak is what is resident now"
# torch has a type of its own for CUDA only; the CPU's, MPS' and the libraries' failures are plain RuntimeErrors.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
ASKED_FOR = re.compile(r"tried to allocate (?:(?P<size>[\d.]+ [KMGT]iB)|(?P<bytes>\d+) bytes)", re.IGNORECASE)


def reset_peak_memory() -> None:
    """Count from here on, on CUDA and Linux; elsewhere the peak stays that since the process began."""
    gc.collect()  # what an earlier run left behind is not this one's
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):
        (PROC / "clear_refs").write_text(RESET_PEAK)


def peak_memory_bytes(device: object) -> int | None:
    """Peak since the last reset, weights included; None where no system call tells. device: `cuda:0`, `cpu`, ...

    On CUDA the sum over all devices: a target may be spread over several.
    """
    if str(device).startswith("cuda"):
        cuda = sys.modules["torch"].cuda
        return sum(cuda.max_memory_allocated(index) for index in range(cuda.device_count()))
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text()):
            return int(found[1]) * 1024
    return _peak_since_process_start()


def _peak_since_process_start() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of Python, numpy or torch gave up."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def shortage(error: BaseException) -> str:
    """ "memory ran out", with what was asked for where the allocator says it."""
    found = ASKED_FOR.search(str(error))
    if found is None:
        return "memory ran out"
    size = found["size"] or f"{int(found['bytes']) / 2**30:.2f} GiB"
    return f"memory ran out ({size} asked for at once)"
