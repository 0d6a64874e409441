"""Temporary folders that do not outlive their process: one that was killed left its folder, and the
next process that makes one removes it.

A lock next to each folder tells whether its process lives: the kernel releases it.
"""

import logging
import os
import shutil
import tempfile
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

from theloom.errors import StoreError
from theloom.store.lock import WriterLock

log = logging.getLogger(__name__)


def temporary_folder(owner: object, prefix: str) -> tuple[Path, weakref.finalize]:
    """Make a folder in the system's temporary one, after those that killed processes left.

    Args:
        owner: the folder is removed with it; or when this process ends.
        prefix: of the folder's name, which tells folders of one kind.

    Returns:
        The folder, and a function that removes it.

    Examples:
        >>> class Owner: ...
        >>> owner = Owner()
        >>> folder, remove = temporary_folder(owner, "theloom-example-")
        >>> folder.is_dir()
        True
        >>> remove()
        >>> folder.exists()
        False
    """
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent, prefix)
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex}"
        lock = WriterLock(folder)
        with suppress(StoreError):  # another process looks whether this one was abandoned
            lock.take()  # before there is a folder to remove
            break
    folder.mkdir(mode=0o700)
    return folder, weakref.finalize(owner, _remove, folder, lock, os.getpid())


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*.lock"):
        folder = path.with_suffix("")
        with suppress(StoreError, OSError):  # its process lives, or it is another user's
            if path.lstat().st_uid != os.getuid():
                continue
            lock = WriterLock(folder)
            lock.take()
            if folder.exists():
                log.info("%s: removed, since its process was killed", folder)
            _remove(folder, lock, os.getpid())


def _remove(folder: Path, lock: WriterLock, owner: int) -> None:
    if os.getpid() == owner:  # not a forked worker
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
