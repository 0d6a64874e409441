"""What `theloom inspect` shows of a dataset, and the checks of `theloom verify` without a model."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import xxhash

from theloom.dataset.activations import Activations
from theloom.dataset.rows import Rows
from theloom.errors import StoreError
from theloom.hooks.points import SCORES
from theloom.store import checksums, commit_log, file_format, index
from theloom.store.nonfinite import count_nonfinite

_PROVENANCE = (
    "model_",
    "tokenizer",
    "corpus",
    "package_versions",
    "code_version",
    "python_version",
    "device",
    "run_fingerprint",
    "config",
)


@dataclass(frozen=True)
class HookSummary:
    """One hook point: the shape of a row, the bytes of all rows uncompressed, and statistics."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    mean: float
    variance: float
    norm: float
    nonfinite: int
    infinite: int


def summarize_hooks(acts: Activations) -> list[HookSummary]:
    """Summarise all hook points of a dataset from its stored statistics; no row is read.

    Args:
        acts: the dataset.

    Returns:
        Summaries in the order of the file.
    """
    summaries = []
    for hook in acts.hooks:
        rows, s = acts[hook], acts.statistics[hook]
        numbers = (s.mean_of_all, s.variance_of_all, s.norm, s.nonfinite, s.infinite)
        summaries.append(HookSummary(hook, rows.shape[1:], rows.nbytes, *numbers))
    return summaries


def provenance_attributes(acts: Activations) -> dict[str, Any]:
    """The attributes that say where the rows came from.

    Args:
        acts: the dataset.

    Returns:
        Plain values by name, with JSON parsed.
    """
    return {k: _plain(v) for k, v in acts.attributes.items() if k.startswith(_PROVENANCE)}


def file_schema(acts: Activations) -> dict[str, Any]:
    """The format of a dataset's file, and what it holds.

    Args:
        acts: the dataset.

    Returns:
        Plain values by name; `longest_window` in tokens, `bytes_on_disk` over all files.
    """
    names = (
        "format",
        "format_version",
        "kind",
        "precision",
        "compression",
        "batch_tokens",
        "chunk_size",
        "tokens",
        "rows_keep",
        "rows_pool",
        "rows_by",
    )
    schema = {name: _plain(acts.attributes[name]) for name in names if name in acts.attributes}
    windows = acts.window_count
    longest = int(np.diff(acts.window_tokens).max(initial=0))
    return schema | {
        "rows": len(acts),
        "documents": acts.document_count,
        "windows": windows,
        "longest_window": longest,
        "files": [_of_folder(p, acts.path.parent) for p in acts.files],
        "bytes_on_disk": sum(map(_size, dict.fromkeys([acts.path, *acts.files]))),
    }


def _size(path: Any) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.size


def _of_folder(path: Path, folder: Path) -> str:
    if not isinstance(path, Path):
        return str(path).removeprefix(f"{folder}/")
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass  # a text that begins like JSON
    return value


_BYTES_AT_ONCE = 1 << 20  # of rows in memory, in each thread: a core's cache holds them
_HELD = 1 << 24  # bytes of rows that were read and stay mapped


def check_hashes(
    acts: Activations, windows: range | None = None, threads: int = 1
) -> tuple[list[int], np.ndarray]:
    """Compare every row with the hash that was written.

    Args:
        acts: the dataset.
        windows: numbers of the windows to check; None: all.
        threads: that read and hash, window by window.

    Returns:
        The numbers of the windows whose rows differ, and the number of nonfinite values by hook
        point, (hook points,) int64.
    """
    windows = range(acts.window_count) if windows is None else windows
    waiting, stop = iter(windows), Event()
    hooks = [(acts[h], h.endswith(SCORES)) for h in acts.hooks]  # -inf: scores of masked keys

    def work() -> tuple[list[int], np.ndarray]:
        wrong, nonfinite, held = list[int](), np.zeros(len(hooks), "<i8"), 0
        for window in waiting:  # whose `next` is one step of the interpreter: no window comes twice
            if stop.is_set():
                break
            rows = range(*(int(r) for r in acts.window_offset[window : window + 2]))
            for number, (reader, masked) in enumerate(hooks):
                digest, count = _hash_of(reader, rows, acts.precision, masked)
                nonfinite[number] += count
                if digest != acts.window_hash[window, number]:
                    wrong.append(window)
                    break
            held = _released(hooks, held, rows)
        return wrong, nonfinite

    with ThreadPoolExecutor(threads) as pool:
        try:
            results = [w.result() for w in [pool.submit(work) for _ in range(threads)]]
        finally:
            stop.set()  # an error or a signal: threads end with their window
    wrong = sorted(window for found, _ in results for window in found)
    return wrong, np.sum([counted for _, counted in results], axis=0)


def _released(hooks: Iterable[tuple[Rows, bool]], first: int, last: range) -> int:
    """Give back the memory of the rows from the first to the last ones that were read, where it is
    more than some megabytes. Returns the first row that was not given back.
    """
    read = slice(first, last.stop)
    for reader, _ in hooks:
        if (last.stop - first) * reader.nbytes <= _HELD * len(reader):
            return first
        for part in reader.on_disk:
            part.release(read)
    return last.stop


def _hash_of(reader: Rows, rows: range, precision: str, masked: bool) -> tuple[int, int]:
    """The hash of rows, and how many of their values are nonfinite."""
    state, count = xxhash.xxh3_64(), 0
    step = max(1, _BYTES_AT_ONCE * len(reader) // max(1, reader.nbytes))
    pieces = [slice(start, min(start + step, rows.stop)) for start in rows[::step]]
    try:
        for part in reader.on_disk:
            for piece in pieces:
                bits = part.numpy(piece)
                state.update(bits.data.cast("B") if bits.size else b"")
                if part is reader:
                    count += count_nonfinite(bits, precision, masked)
        for piece in pieces if reader not in reader.on_disk else ():  # decoded from what is stored
            count += count_nonfinite(reader.numpy(piece), precision, masked)
    except StoreError:  # a packed chunk that cannot be unpacked
        state.reset()
    return state.intdigest(), count


def damaged_parts(acts: Activations, files: Iterable[Path] | None = None) -> list[str]:
    """Check all of a dataset but its rows: metadata, tables and logs of the file and its shards.

    Args:
        acts: the dataset.
        files: of those, the ones to check; None: all.

    Returns:
        A line for each damaged file, which names its damaged parts.
    """
    damaged = []
    for path in dict.fromkeys([acts.path, *acts.files] if files is None else files):
        try:
            with file_format.reading(path) as file:
                listed = index.of(file, path)
                broken = checksums.changed_parts(file.fd, listed, *checksums.ALL)
                if listed != index.derived(file, path):
                    broken.append("its index")
                if "commit_log" in listed.datasets:
                    columns = ("commit_log", "windows/hash", "windows/batch")
                    records = commit_log.broken_records(
                        *(listed.array(file.fd, c) for c in columns)
                    )
                    if records:
                        broken.append(
                            f"{len(records)} records of its log (first: batch {records[0]})"
                        )
        except StoreError as error:
            broken = [str(error).removeprefix(f"{path}: ")]
        if broken:
            damaged.append(f"{path.name}: {', '.join(broken)}")
    return damaged
