"""The peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not report it.

    On Linux ``ru_maxrss`` would also count the process that started this one, so the kernel's own mark is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        marks = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM")]
        if marks:
            return int(marks[0].split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
