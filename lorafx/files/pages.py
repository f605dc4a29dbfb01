"""Release the memory that a mapped file takes while it is read."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

import numpy as np

#: Linux's advice to forget pages: those of a file are read again, others lose what is in them.
_FORGET = 4
#: Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of the kernel).
_IN_MEMORY, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def release(address: int, size: int) -> bool:
    """Release the pages within ``size`` bytes from ``address``; using them again reads the file again.

    Does nothing where any of them differs from its file, or where the system does not say. Returns whether they were
    released.
    """
    if sys.platform != "linux":
        return False
    page = mmap.PAGESIZE
    start, end = -(-address // page) * page, (address + size) // page * page
    if end <= start:
        return False
    try:
        with open("/proc/self/pagemap", "rb") as stream:
            stream.seek(start // page * 8)
            pages = np.frombuffer(stream.read((end - start) // page * 8), np.uint64)
    except OSError:
        return False
    used = (pages & _IN_MEMORY) != 0
    if bool((used & ((pages & _OF_FILE) == 0)).any()) or bool(((pages & _SWAPPED) != 0).any()):
        return False
    return _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _FORGET) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
