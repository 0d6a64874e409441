"""One writer for a file: a lock that the kernel releases when its process ends, however it ends."""

import errno
import fcntl
import logging
import os
from pathlib import Path

from theloom.errors import StoreError

log = logging.getLogger(__name__)


class WriterLock:
    """Holds `<file>.lock` from `take` to `release`.

    Args:
        path: the file that is to be written.
    """

    def __init__(self, path: Path) -> None:
        self._target = path
        self._path = path.with_name(path.name + ".lock")
        self._fd = -1

    def take(self) -> None:
        """Take the lock, without waiting.

        Raises:
            StoreError: another process, or another writer of this one, holds it.
        """
        while self._fd < 0:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    holder = os.pread(fd, 100, 0).decode(errors="replace")
                    os.close(fd)
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                        raise
                    raise StoreError(
                        f"{self._target}: another job writes it (process "
                        f"{holder or 'unknown'}); wait for it, or end it"
                    ) from None
                log.warning(
                    "%s: this file system has no locks: nothing keeps a second writer out",
                    self._path,
                )
            if _is_at(self._path, fd):
                self._fd = fd
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}".encode(), 0)
            else:  # its last holder removed it after this process opened it and before it locked it
                os.close(fd)

    def release(self) -> None:
        """Remove the lock file and release the lock; does nothing if it is not held."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _is_at(path: Path, fd: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
