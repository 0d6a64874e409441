"""What every format is written from: the rows of a dataset, and a folder that can be resumed.

A format writes files, each under a temporary name until it is whole. So an export that was killed
goes on with the files that are missing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.errors import ConfigError, StoreError, printable
from theloom.exports.folder import whole
from theloom.rows.roles import ROLES, code
from theloom.store.hdf5 import element_types

if TYPE_CHECKING:
    import torch

    from theloom.dataset.activations import Activations
    from theloom.dataset.rows import HookRows

_FILE_BYTES = 1 << 29  # of a file of many rows
_AT_ONCE = 8  # files that are written: while one waits for the disk, others are filled
_HELD = 1 << 28  # bytes of memory for the files that are written at once
_READ_BYTES = 1 << 22  # of rows that are read before they are converted
_ELEMENTS = 1 << 15  # that torch converts at once: of more it would share the work with threads


@dataclass(frozen=True)
class Unit:
    """A window: what the model saw at once.

    Args:
        number: of the window in the file.
        document: number of its document.
        rows: its rows.
    """

    number: int
    document: int
    rows: slice

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass
class Job:
    """One export.

    Args:
        acts: the rows.
        hooks: the hook points, in order.
        folder: where the files go.
        dtype: `fp32`, `fp16` or `bf16`.
        context_size: rows of a context; None: none was requested.
        fit: `pack` or `cut`, how rows become contexts; None: they must fit.
        advance: is told how many rows of one hook point were written.
    """

    acts: "Activations"
    hooks: list[str]
    folder: Path
    dtype: str
    context_size: int | None = None
    fit: str | None = None
    advance: Callable[[int], object] = lambda rows: None
    left_out: list[str] = field(default_factory=list)
    _stored: "dict[str, HookRows]" = field(default_factory=dict)
    _counting: Lock = field(default_factory=Lock)

    @cached_property
    def width(self) -> int:
        """Elements of a row.

        Raises:
            ConfigError: rows of the hook points have different shapes, or more than one axis.
        """
        shapes = {hook: self.acts[hook].shape[1:] for hook in self.hooks}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            listed = ", ".join(f"{h} {'×'.join(map(str, s))}" for h, s in shapes.items())
            raise ConfigError(f"this format takes hook points of one width; --hooks has {listed}")
        return int(next(iter(shapes.values()))[0])

    @property
    def numpy_dtype(self) -> str:
        """The dtype of NumPy; of BF16, which it lacks, float32."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "float32"}[self.dtype]

    @cached_property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype of PyTorch."""
        from theloom.precision import torch_dtype

        return torch_dtype(self.dtype)

    def stored(self, hook: str) -> "HookRows":
        """The rows of a hook point as the file has them, whose files are looked up once.

        Args:
            hook: the name of the hook point.

        Returns:
            The rows; nothing is read.
        """
        if hook not in self._stored:
            self._stored[hook] = self.acts[hook]
        return self._stored[hook]

    def fill(self, hook: str, start: int, out: "torch.Tensor") -> None:
        """Read consecutive rows into memory that is there.

        Args:
            hook: the name of the hook point.
            start: the first row.
            out: (rows, …) of any dtype and any strides, on the CPU; `advance` is told how many.
        """
        import torch

        stored = self.stored(hook)
        if out.dtype == stored.dtype:
            stored.read_into(element_types.shared_bits(out), start)
        else:
            width = max(1, out[:1].numel())
            step = max(1, _READ_BYTES // (width * stored.dtype.itemsize))
            read = torch.empty((min(step, len(out)), *out.shape[1:]), dtype=stored.dtype)
            for first in range(0, len(out), step):
                some = out[first : first + step]
                found = read[: len(some)]
                stored.read_into(element_types.shared_bits(found), start + first)
                pieces = max(1, _ELEMENTS // width)
                for to, of in zip(some.split(pieces), found.split(pieces), strict=True):
                    to.copy_(of)
        with self._counting:
            self.advance(len(out))

    def rows(self, hook: str, rows: slice | np.ndarray) -> "torch.Tensor":
        """Rows of a hook point in the dtype of the export.

        Args:
            hook: the name of the hook point.
            rows: which ones, a slice or their numbers.

        Returns:
            (rows, …) on the CPU; `advance` is told how many.
        """
        import torch

        stored = self.stored(hook)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(stored))
            found = torch.empty((stop - start, *stored.shape[1:]), dtype=self.torch_dtype)
            self.fill(hook, start, found)
            return found
        found = stored[rows].to(self.torch_dtype)
        with self._counting:
            self.advance(len(found))
        return found

    def array(self, hook: str, rows: slice | np.ndarray) -> np.ndarray:
        """The same as `rows`, for NumPy.

        Args:
            hook: the name of the hook point.
            rows: which ones, a slice or their numbers.

        Returns:
            (rows, …); float32 where the export is BF16, which NumPy lacks.
        """
        tensor = self.rows(hook, rows)
        return (tensor.float() if self.dtype == "bf16" else tensor).numpy()

    def blocks(self, size: int | None = None) -> Iterator[slice]:
        """All rows, as many at once as fit a file.

        Args:
            size: bytes of one row, of all hook points; None: of the widest hook point alone.

        Yields:
            Slices of rows, which follow each other.
        """
        each = size or max(4 * int(np.prod(self.acts[h].shape[1:])) for h in self.hooks)
        step = max(1, _FILE_BYTES // each)
        for start in range(0, len(self.acts), step):
            yield slice(start, min(start + step, len(self.acts)))

    @cached_property
    def windows(self) -> list[Unit]:
        """The windows that have rows."""
        offset = self.acts.window_offset
        return [
            Unit(number, document, slice(first, end))
            for number, (document, first, end) in enumerate(
                zip(
                    self.acts.window_document.tolist(),
                    offset[:-1].tolist(),
                    offset[1:].tolist(),
                    strict=True,
                )
            )
            if end > first
        ]

    @cached_property
    def documents(self) -> list[Unit]:
        """The documents that have rows; `number` is the document's too."""
        offset = self.acts.document_offset.tolist()
        return [
            Unit(number, number, slice(first, end))
            for number, (first, end) in enumerate(itertools.pairwise(offset))
            if end > first
        ]

    @property
    def is_selected(self) -> bool:
        """Whether some rows of the file are left out by an expression."""
        return len(self.acts) != int(self.acts.attributes["rows"])

    def need_every_token(self, name: str) -> None:
        """Check that every token has its row.

        Args:
            name: of the format, for the message.

        Raises:
            ConfigError: rows are those of some tokens, or pooled.
        """
        if self.acts.row_tokens is not None:
            raise ConfigError(
                f"{name} needs the rows of all tokens; {self.acts.path} has those that rows.keep "
                "or --keep kept"
            )

    def need_one_hook(self, name: str) -> str:
        """Check that the export has one hook point.

        Args:
            name: of the format, for the message.

        Returns:
            Its name.

        Raises:
            ConfigError: there are several.
        """
        if len(self.hooks) > 1:
            raise ConfigError(
                f"{name} holds one hook point; choose it with --hooks: {', '.join(self.hooks)}"
            )
        return self.hooks[0]

    def special(self, rows: slice) -> np.ndarray:
        """Tell which rows are of special tokens.

        Args:
            rows: which ones.

        Returns:
            (rows,) bool.

        Raises:
            ConfigError: the file does not know.
        """
        table = self.acts.token_table("special")
        if table is None:
            raise ConfigError(
                f"{self.acts.path} does not know which tokens are special; extract it again with "
                "this version"
            )
        return table.numpy(rows).astype(bool)

    def loss_mask(self, rows: slice) -> np.ndarray | None:
        """Tell which rows are of the assistant's tokens.

        Args:
            rows: which ones.

        Returns:
            (rows,) int64: 1 where the token is the assistant's; None: the texts are no
            conversations.

        Raises:
            StoreError: the file has roles that there are not.
        """
        table = self.acts.token_table("role")
        if table is None:
            return None
        found = table.numpy(rows)
        if len(found) and found.max() >= len(ROLES):
            raise StoreError(f"{self.acts.path}: it has roles that there are not")
        return (found == code("assistant")).astype(np.int64)

    def leave_out(self, sentence: str) -> None:
        """Record what the export could not carry.

        Args:
            sentence: what it is; it is recorded once.
        """
        if sentence not in self.left_out:
            self.left_out.append(sentence)

    def is_done(self, name: str) -> bool:
        """Whether a file was written before.

        Args:
            name: of the file in the export's folder.

        Returns:
            True where it is there: files appear whole.
        """
        return (self.folder / name).exists()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Have a file written: under another name, until it is whole and on the disk.

        Args:
            name: of the file in the folder.

        Yields:
            The path to write to.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            yield unfinished

    def write_files(
        self, names: Sequence[str], write: Callable[[int, Path], object], held: int
    ) -> None:
        """Write those of many files that are not done, several at once.

        Args:
            names: of the files in the export's folder.
            write: is called in a thread with the number of a name, and the path to write to.
            held: bytes of memory that it takes for a file, at most.
        """
        missing = [number for number, name in enumerate(names) if not self.is_done(name)]

        def one(number: int) -> None:
            with self.writing(names[number]) as path:
                write(number, path)

        with ThreadPoolExecutor(max(1, min(_AT_ONCE, _HELD // max(1, held)))) as pool:
            for first in range(0, len(missing), 1024):
                for _ in pool.map(one, missing[first : first + 1024]):
                    pass  # the first that fails is raised here, and those that wait are not begun

    def write_text(self, name: str, text: str) -> None:
        """Write a small file.

        Args:
            name: of the file in the export's folder.
            text: written as UTF-8.
        """
        with self.writing(name) as path:
            path.write_text(text, encoding="utf-8")

    def write_torch(self, name: str, value: Any) -> None:
        """Write a file for `torch.load(…, weights_only=True)`.

        Args:
            name: of the file in the export's folder.
            value: tensors and plain values.
        """
        import torch

        with self.writing(name) as path:
            torch.save(value, path)

    def number_of_layer(self, hook: str) -> int | None:
        """The number of blocks that a point of the residual stream has passed: the index in
        `hidden_states` of transformers.

        Args:
            hook: the name of the hook point.

        Returns:
            The number; None for another hook point.

        Examples:
            `blocks.0.hook_resid_pre` is 0, `blocks.0.hook_resid_post` and `blocks.1.hook_resid_pre`
            are 1: `hidden_states[1]` of transformers.
        """
        parts = hook.split(".")
        if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdigit():
            return None
        after = {"hook_resid_pre": 0, "hook_resid_post": 1}.get(parts[2])
        return None if after is None else int(parts[1]) + after

    def layers(self, name: str) -> list[int]:
        """The layers of all hook points, as `number_of_layer`.

        Args:
            name: of the format, for the message.

        Returns:
            Their numbers, in the order of `hooks`.

        Raises:
            ConfigError: one of them is none of the residual stream.
        """
        numbers = [self.number_of_layer(hook) for hook in self.hooks]
        others = [h for h, n in zip(self.hooks, numbers, strict=True) if n is None]
        if others:
            raise ConfigError(
                f"{name} holds the residual stream, blocks.N.hook_resid_pre or hook_resid_post; "
                f"{', '.join(others)} is not of it"
            )
        return [n for n in numbers if n is not None]

    @property
    def last_layer(self) -> int:
        """The number of the model's blocks.

        Raises:
            ConfigError: the file does not know.
        """
        blocks = self.acts.attributes.get("model_blocks")
        if not isinstance(blocks, int):
            raise ConfigError(
                f"{self.acts.path} does not say how many blocks its model has; extract it again "
                "with this version"
            )
        return blocks


def safe_names(ids: Sequence[str], taken: str = "/\\") -> list[str]:
    """File names for the ids of documents.

    Args:
        ids: the ids.
        taken: characters that a name may not have; each becomes `_`.

    Returns:
        Names in the order of the ids.

    Raises:
        ConfigError: two ids become one name, or one is no name.

    Examples:
        >>> safe_names(["a/b", "c"])
        ['a_b', 'c']
    """
    names = ["".join("_" if c in taken or not c.isprintable() else c for c in i) for i in ids]
    seen: dict[str, str] = {}
    for name, of in zip(names, ids, strict=True):
        if name in ("", ".", "..") or len(name.encode()) > 200:
            raise ConfigError(f"document {printable(of)!r}: its id cannot name a file")
        if name in seen:
            raise ConfigError(
                f"documents {printable(seen[name])!r} and {printable(of)!r} would both be named "
                f"{printable(name)!r}; give them other ids"
            )
        seen[name] = of
    return names
