"""The files of a folder, of which there may be a million: a `Path` takes five times as much."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

_SEPARATOR = "\0"  # sorts names as paths are sorted: folder by folder


class Files(Sequence[Path]):
    """Files below a folder, in the order of their paths.

    Args:
        root: the folder.
        names: of the files, below it, with `/`.

    Examples:
        >>> files = Files(Path("/x"), ["a.txt", "a/b.txt"])
        >>> list(files.names()), len(files), files[1].name
        (['a/b.txt', 'a.txt'], 2, 'a.txt')
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self._root = root
        self._names = [name.replace("/", _SEPARATOR) for name in names]
        self._names.sort()

    def names(self) -> Iterator[str]:
        """The names of all files.

        Yields:
            Each below the folder, with `/`.
        """
        for name in self._names:
            yield name.replace(_SEPARATOR, "/")

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> "Files": ...

    def __getitem__(self, index: int | slice) -> "Path | Files":
        if isinstance(index, slice):
            return Files(self._root, (n.replace(_SEPARATOR, "/") for n in self._names[index]))
        return self._root / self._names[index].replace(_SEPARATOR, "/")
