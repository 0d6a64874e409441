"""The residual stream of a whole shard between two blocks: in host memory, or on disk where it does
not fit there.

What a killed job has done is kept at checkpoints: the residuals after a block go to one of two
files in turn, are synced, and then a manifest that names them takes its place at once. On disk
anyway, every block is a checkpoint.
"""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from theloom.devices import streams
from theloom.devices.pinned import pinned_empty
from theloom.devices.streams import DONE, Mark, SideStreams
from theloom.store import file_format
from theloom.store.hdf5.element_types import raw_bytes
from theloom.store.ring_buffer import IN_FLIGHT

log = logging.getLogger(__name__)

BLOCKS_BETWEEN_CHECKPOINTS = 8
PIECE = 64 << 20


@dataclass(frozen=True)
class ResidualSpec:
    """The residuals of a shard, piece by piece: a batch, or a chunk of one, (windows, positions,
    hidden size).

    `identity` says whose they are.
    """

    shapes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    identity: str

    @property
    def nbytes(self) -> int:
        """Bytes of the residuals of all pieces."""
        return self.dtype.itemsize * sum(w * t * h for w, t, h in self.shapes)


def host_memory(spec: ResidualSpec, device: torch.device, spilled: bool = False) -> torch.Tensor:
    """Memory for all residuals of a shard: made once a job, since pinning it takes long.

    Args:
        spec: the residuals.
        device: where they come from; for a GPU the memory is pinned.
        spilled: they stay in files, and no memory is needed.

    Returns:
        A flat CPU tensor of all their elements, none where they are spilled.
    """
    count = 0 if spilled else sum(w * t * h for w, t, h in spec.shapes)
    return pinned_empty(count, spec.dtype, device)


class ResidualStore:
    """Residuals by piece. `path` is the place of its files less their ends; None: no checkpoints,
    memory alone.

    `block_done` ends a block; it writes a checkpoint when one is due, after `commit` has made safe
    all rows up to it. `device` is where they come from and go to, `memory` what `host_memory` made.
    `take_up` gives the number of blocks that an earlier job's checkpoint has
    behind it. Use it as a context manager.
    """

    def __init__(
        self,
        spec: ResidualSpec,
        path: Path | None,
        spilled: bool = False,
        device: torch.device | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        assert path is not None or not spilled
        self._spec, self._path, self._spilled = spec, path, spilled
        self._starts = [0]
        for windows, positions, hidden in spec.shapes:
            self._starts.append(self._starts[-1] + windows * positions * hidden)
        self._device = device or torch.device("cpu")
        self._memory = host_memory(spec, self._device, spilled) if memory is None else memory
        self._fds: list[int] = []
        self._written = xxhash.xxh3_64()
        self._turn = 0  # the file that is read, or was last written
        self._sides, self._out = SideStreams(), SideStreams()
        self._leaving: dict[int, Mark] = {}  # copies to the host that may be on their way
        self.bytes_written = 0

    def __enter__(self) -> "ResidualStore":
        if self._spilled:
            self._fds = [
                os.open(self._file(turn), os.O_RDWR | os.O_CREAT, 0o644) for turn in (0, 1)
            ]
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._memory = torch.empty(0, dtype=self._spec.dtype)

    def incoming(self, pieces: Iterable[tuple[int, slice]]) -> Generator[torch.Tensor]:
        """Read residuals onto the device, in turn: on a GPU each is on its way while the
        computation is busy with the one before.

        Args:
            pieces: numbers of pieces, and which of their windows.

        Yields:
            (windows, positions, hidden size) on the device.
        """
        asked = iter(pieces)
        if self._device.type == "cpu":
            yield from (self.read(piece)[windows] for piece, windows in asked)
            return
        ahead = self._send(asked)
        try:
            while ahead is not None:
                here, arrived = ahead
                ahead = self._send(asked)
                arrived.before_next()
                yield here
                del here
        finally:
            if ahead is not None:  # its memory is the device's, and the host's is the store's
                ahead[1].before_next()
                ahead[1].synchronize()

    def _send(self, asked: Iterator[tuple[int, slice]]) -> tuple[torch.Tensor, Mark] | None:
        found = next(asked, None)
        if found is None:
            return None
        piece, windows = found
        on_host = self._on_host(piece)[windows]
        there = torch.empty(on_host.shape, dtype=on_host.dtype, device=self._device)
        before = streams.mark(self._device), self._leaving.get(piece, DONE)
        return there, streams.copy_in(on_host, there, self._sides, *before)

    def finish(self, piece: int | None = None) -> None:
        """Wait until residuals have come to the host.

        Args:
            piece: its number; None: all.
        """
        for number in list(self._leaving) if piece is None else [piece]:
            if number in self._leaving:
                self._leaving.pop(number).synchronize()

    def read(self, piece: int) -> torch.Tensor:
        """Read the residuals of a piece.

        Args:
            piece: its number.

        Returns:
            (windows, positions, hidden size), on the host.
        """
        self.finish(piece)
        return self._on_host(piece)

    def _on_host(self, piece: int) -> torch.Tensor:
        first, last, shape = self._starts[piece], self._starts[piece + 1], self._spec.shapes[piece]
        if not self._spilled:
            return self._memory[first:last].view(shape)
        values = torch.empty(shape, dtype=self._spec.dtype)
        view, place = raw_bytes(values), first * self._spec.dtype.itemsize
        while view:
            got = os.preadv(self._fds[self._turn], [view[:PIECE]], place)
            if not got:
                raise OSError(f"{self._file(self._turn).name} is too short")
            view, place = view[got:], place + got
        return values

    def write(self, piece: int, values: torch.Tensor) -> None:
        """Replace the residuals of a piece, for the block to come. Pieces come in their order.

        Args:
            piece: its number.
            values: (windows, positions, hidden size), in the dtype of the spec.
        """
        assert (values.dtype, tuple(values.shape)) == (self._spec.dtype, self._spec.shapes[piece])
        first, last = self._starts[piece], self._starts[piece + 1]
        if not self._spilled:
            place = self._memory[first:last].view(values.shape)
            self._leaving.pop(piece, None)
            self._leaving[piece] = streams.copy_out(values, place, self._out)
            while len(self._leaving) > IN_FLIGHT:  # each keeps its value on the device
                self.finish(next(iter(self._leaving)))
            return
        values = values.cpu()
        self._pwrite(self._fds[1 - self._turn], values, first * self._spec.dtype.itemsize)
        self._written.update(raw_bytes(values))

    def block_done(self, blocks: int, commit: Callable[[], None], last: bool = False) -> None:
        """End a block, and write a checkpoint when one is due.

        Args:
            blocks: those that all batches have gone through.
            commit: makes safe all rows up to this block; called before a checkpoint.
            last: no block follows, so that no checkpoint is needed.
        """
        due = self._spilled or blocks % BLOCKS_BETWEEN_CHECKPOINTS == 0
        if self._path is None or (due and last):  # what follows needs no residuals
            due = False
        digest = self._turn_over()
        if not due:
            return
        self.finish()
        commit()
        if not self._spilled:
            digest = self._save()
        else:
            os.fsync(self._fds[self._turn])
        self._write_manifest(blocks, digest)

    def entered(self) -> None:
        """All batches have their residuals before the first block."""
        self._turn_over()

    def take_up(self) -> int:
        """Take up an earlier job's checkpoint.

        Returns:
            The blocks behind it, whose residuals are now in the store; 0 where there is none of
            this shard.
        """
        if self._path is None:
            return 0
        try:
            manifest = json.loads(self._manifest.read_text(encoding="utf-8"))
            if manifest["identity"] != self._key():
                return 0
            turn, blocks, expected = (
                int(manifest["file"]),
                int(manifest["blocks"]),
                manifest["hash"],
            )
            digest = self._hash_of_file(turn, None if self._spilled else raw_bytes(self._memory))
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        if digest != expected:
            log.warning("%s is damaged: restarting at the first block", self._file(turn).name)
            return 0
        self._turn = turn
        return blocks

    def remove(self) -> None:
        """Delete the files: the shard is finished."""
        if self._path is not None:
            for file in (self._manifest, self._file(0), self._file(1)):
                file.unlink(missing_ok=True)

    @property
    def _manifest(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".residuals.json")

    def _file(self, turn: int) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.residuals.{turn}")

    def _key(self) -> str:
        shapes = xxhash.xxh3_64_hexdigest(repr(self._spec.shapes).encode())
        return f"{self._spec.identity} {shapes} {self._spec.dtype}"

    def _pwrite(self, fd: int, values: torch.Tensor, place: int) -> None:
        view = raw_bytes(values)
        self.bytes_written += len(view)
        while view:
            done = os.pwrite(fd, view[:PIECE], place)
            view, place = view[done:], place + done

    def _turn_over(self) -> str:
        """Read what was written from now on; its hash."""
        digest = self._written.hexdigest()
        self._written.reset()
        if self._spilled:
            self._turn = 1 - self._turn
        return digest

    def _save(self) -> str:
        turn = 1 - self._turn
        fd = os.open(self._file(turn), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            self._pwrite(fd, self._memory, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._turn = turn
        return xxhash.xxh3_64_hexdigest(raw_bytes(self._memory))

    def _write_manifest(self, blocks: int, digest: str) -> None:
        manifest = {"identity": self._key(), "blocks": blocks, "file": self._turn, "hash": digest}
        new = self._manifest.with_name(self._manifest.name + ".new")
        new.write_text(json.dumps(manifest), encoding="utf-8")
        file_format.sync(new)
        new.replace(self._manifest)
        file_format.sync(self._manifest.parent)

    def _hash_of_file(self, turn: int, into: memoryview | None) -> str:
        """Read a file through, into memory if so requested. Raises OSError where it is shorter than
        the residuals.
        """
        state, place = xxhash.xxh3_64(), 0
        piece = bytearray(min(PIECE, self._spec.nbytes)) if into is None else b""
        with self._file(turn).open("rb", buffering=0) as f:
            while place < self._spec.nbytes:
                room = min(PIECE, self._spec.nbytes - place)
                target = memoryview(piece)[:room] if into is None else into[place : place + room]
                got = f.readinto(target)
                if not got:
                    raise OSError(f"{self._file(turn).name} is too short")
                state.update(target[:got])
                place += got
        return state.hexdigest()
