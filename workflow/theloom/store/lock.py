"""One writer for a file: a lock that the kernel releases when its process ends, however it ends.

Where a file system has no locks, a file that only one process can create stands in for it. Nobody
removes that file when its process is killed, so it names its machine: there, a socket's name that
the kernel releases tells the next job that the first is gone. Another machine cannot know.
"""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from theloom.errors import StoreError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class WriterLock:
    """Holds `<file>.lock` from `take` to `release`.

    Args:
        path: the file that is to be written.
    """

    def __init__(self, path: Path) -> None:
        self._target = path
        self._path = path.with_name(path.name + ".lock")
        self._owner = path.with_name(path.name + ".lock.owner")
        self._fd = -1
        self._socket: socket.socket | None = None

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
                holder = os.pread(fd, 100, 0).decode(errors="replace")
                os.close(fd)
                if error.errno in _NO_LOCKS:
                    self._take_by_name()
                    return
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise self._is_held(f"process {holder or 'unknown'}") from None
            if _is_at(self._path, fd):
                self._fd = fd
                with suppress(OSError):  # words for a message: a full disk says so elsewhere
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}".encode(), 0)
            else:  # its last holder removed it after this process opened it and before it locked it
                os.close(fd)

    def _take_by_name(self) -> None:
        """Create the file that stands in for a lock."""
        own, folder = _machine(), self._path.parent.stat()
        name = f"\0theloom:{folder.st_dev}:{folder.st_ino}:{self._path.name}"
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            bound.bind(name)
            try:
                fd = os.open(self._owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            except FileExistsError:
                holder = self._owner.read_text(encoding="utf-8", errors="replace")
                if holder.split("\n")[1:] != [own]:
                    raise self._is_held(
                        f"process {holder.split(chr(10))[0] or 'unknown'}",
                        f"; its disk has no locks: if that job was killed, remove {self._owner}",
                    ) from None
                fd = os.open(self._owner, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(f"{os.getpid()} on {os.uname().nodename}\n{own}")
        except BaseException as error:
            bound.close()
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise self._is_held("a process of this machine") from None
            raise
        self._socket = bound
        self._path.unlink(missing_ok=True)

    def _is_held(self, who: str, more: str = "") -> StoreError:
        return StoreError(
            f"{self._target}: another job writes it ({who}); wait for it, or end it{more}"
        )

    def release(self) -> None:
        """Remove the lock file and release the lock; does nothing if it is not held."""
        if self._socket is not None:
            self._owner.unlink(missing_ok=True)
            self._socket.close()
            self._socket = None
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _machine() -> str:
    """Names what shares names of sockets with this process: a machine since it started, or a
    container.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.uname().nodename} {boot} {Path('/proc/self/ns/net').readlink()}"


def _is_at(path: Path, fd: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
