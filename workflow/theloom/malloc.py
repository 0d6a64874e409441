"""How glibc's malloc treats the tensors of a job: the place of one that is freed is taken again.

PyTorch takes every tensor from posix_memalign(3). glibc cuts it out of a block that is a little larger, and keeps the
piece before it in its caches of small blocks, where it counts as in use: freed tensors do not grow together with it,
the next tensor of the same size does not fit where the last one was, and a job's memory at its peak depends on chance.
Without these caches it does not. With all but the largest blocks in the heap instead of mappings of their own, and a
heap that is not cut where its end is free, the kernel need not clear pages over and over either. (GNU C Library manual,
"Memory Allocation Tunables"; what it saves is in workflow/docs/performance.md. Another C library does not look at it.)
"""

import ctypes
import os
import platform
from collections.abc import MutableMapping

_VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
    "glibc.malloc.mmap_threshold": 32 << 20,  # the most that glibc takes
    "glibc.malloc.trim_threshold": 1 << 30,
}


def reuse_freed_blocks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set it for every process that is started with this environment; what the user has set stays."""
    own = [setting for setting in environment.get(_VARIABLE, "").split(":") if setting]
    names = {setting.partition("=")[0] for setting in own}
    ours = [f"{name}={value}" for name, value in TUNABLES.items() if name not in names]
    environment[_VARIABLE] = ":".join(own + ours)


def give_back() -> None:
    """Give what is free in this process's heap back to the system, so that growth from here on is counted whole."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
