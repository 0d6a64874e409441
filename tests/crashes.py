"""A writer's disk under a lens: every call that changes a file is recorded, and replayed up to any
point.

`after_kill` gives the files as a killed process leaves them: all calls up to a point.
`after_power_cut` gives them as a machine without power may: what was synced is there, and of what
was written since, any sectors or none.
"""

import os
import random
import threading
from pathlib import Path

SECTOR = 512


class Disk:
    """Records what the code under test does to the files of one folder, from a first copy of them
    on.
    """

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        self.calls: list[tuple] = []
        self._lock = threading.Lock()
        self._start = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}
        real = {name: getattr(os, name) for name in ("pwrite", "fdatasync", "fsync")}
        replace, unlink = Path.replace, Path.unlink

        def name_of(fd: int) -> str:
            return Path(f"/proc/self/fd/{fd}").readlink().name

        def pwrite(fd: int, data, offset: int) -> int:
            with self._lock:
                self.calls.append(("write", name_of(fd), offset, bytes(data)))
                return real["pwrite"](fd, data, offset)

        def sync(which: str):
            def call(fd: int) -> None:
                is_folder = Path(f"/proc/self/fd/{fd}").is_dir()
                name = "" if is_folder else name_of(fd)
                with self._lock:
                    self.calls.append(("sync begins", name))
                    number = len(self.calls) - 1
                real[which](fd)
                with self._lock:
                    # a file that HDF5 itself has written comes into the record as it is when it is
                    # first synced
                    whole = (folder / name).read_bytes() if name and not self._known(name) else None
                    self.calls.append(("sync ends", name, number, whole))

            return call

        def renamed(path: Path, target) -> Path:
            with self._lock:
                self.calls.append(("rename", path.name, Path(target).name))
                return replace(path, target)

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            with self._lock:
                self.calls.append(("unlink", path.name))
                unlink(path, missing_ok)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "fdatasync", sync("fdatasync"))
        monkeypatch.setattr(os, "fsync", sync("fsync"))
        monkeypatch.setattr(Path, "replace", renamed)
        monkeypatch.setattr(Path, "unlink", unlinked)

    def _known(self, name: str) -> bool:
        return any(
            c[0] == "sync ends" and c[1] == name and c[3] is not None for c in self.calls
        ) or any(c[0] == "rename" and c[2] == name for c in self.calls)

    def after_kill(self, point: int, target: Path) -> None:
        """The folder after the first `point` calls."""
        self._replay(point, target, lambda number, offset, data: [(offset, data)])

    def after_power_cut(self, point: int, target: Path, choose: random.Random) -> None:
        """The folder after a power cut there: of writes that no completed sync covers, random
        sectors are there.
        """
        calls = self.calls[:point]
        covered = {
            c[1]: c[2] for c in calls if c[0] == "sync ends"
        }  # by file: when its last completed sync began
        names = self._final_names(calls)
        share = choose.choice([0.0, 0.5, 1.0])

        def survives(number: int, offset: int, data: bytes) -> list[tuple[int, bytes]]:
            name = calls[number][1]
            last = max((covered[n] for n in names.get(name, {name}) if n in covered), default=-1)
            if number < last:
                return [(offset, data)]
            kept, at = [], 0
            while at < len(data):
                end = min(len(data), at + SECTOR - (offset + at) % SECTOR)
                if choose.random() < share:
                    kept.append((offset + at, data[at:end]))
                at = end
            return kept

        self._replay(point, target, survives)

    @staticmethod
    def _final_names(calls: list[tuple]) -> dict[str, set[str]]:
        """All names that a file has had, by each of them."""
        names: dict[str, set[str]] = {}
        for call in calls:
            if call[0] == "rename":
                same = names.get(call[1], {call[1]}) | {call[2]}
                for name in same:
                    names[name] = same
        return names

    def _replay(self, point: int, target: Path, survives) -> None:
        target.mkdir(parents=True)
        files = {name: bytearray(content) for name, content in self._start.items()}
        for number, call in enumerate(self.calls[:point]):
            if call[0] == "sync ends" and call[3] is not None:
                files[call[1]] = bytearray(call[3])
            elif call[0] == "write" and call[1] in files:
                for offset, data in survives(number, call[2], call[3]):
                    files[call[1]][offset : offset + len(data)] = data
            elif call[0] == "rename" and call[1] in files:
                files[call[2]] = files.pop(call[1])
            elif call[0] == "unlink":
                files.pop(call[1], None)
        for name, content in files.items():
            (target / name).write_bytes(content)


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("rb+") as f:
        f.seek(offset)
        (byte,) = f.read(1)
        f.seek(offset)
        f.write(bytes([byte ^ 1 << bit]))
