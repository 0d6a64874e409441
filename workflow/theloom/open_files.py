"""The number of files that a process may have open: a dataset of many shards has each open of which it has read rows.

The soft limit, often 1,024, is there for programs that cannot count further; any process may raise it to the hard one.
"""

import sys

from theloom.errors import StoreError

BESIDE = 100  # libraries, sockets, what else the process reads


def allow(files: int, what: str) -> None:
    """Let this process open so many files more. Raises StoreError where the hard limit is lower; `what` names them."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + BESIDE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StoreError(
            f"{what} are {files} open files, and this process may have {hard}; raise the limit (ulimit -n), or "
            "make one file of them with store.merge=physical"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
