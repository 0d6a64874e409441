"""`python workflow/bench/store.py`: the speed of the store, compared to the plainest way to do the
same on this disk.

Each pair runs alternately for several rounds; the table has the medians and their ratio. This is
not a test: the numbers are of this machine, at this moment.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import h5py
import numpy as np
import torch
from theloom.dataset import activations, merge
from theloom.dataset.batches import BLOCK_ROWS
from theloom.exports import export
from theloom.hooks.points import residual_points
from theloom.precision import torch_dtype
from theloom.store import file_format, provenance
from theloom.store.hdf5 import element_types
from theloom.store.shard_file import ShardSpec, ShardTokens
from theloom.store.writer import ShardWriter
from theloom.terminal import table

_HIDDEN, _WINDOW, _ROUNDS = 1024, 512, 5


_POINTS = residual_points(1, _HIDDEN)


def spec(windows: int, shard: int, precision: str = "bf16", first_row: int = 0) -> ShardSpec:
    """A shard of that many windows of 512 tokens, two hook points of width 1024, four windows a
    batch.
    """
    rows = windows * _WINDOW
    offsets = np.arange(0, rows + 1, _WINDOW, dtype="<i8")
    tokens = ShardTokens(
        first_row,
        np.zeros(rows, "<i4"),
        np.repeat(np.arange(windows, dtype="<i4"), _WINDOW),
        np.tile(np.arange(_WINDOW, dtype="<i4"), windows),
        offsets,
        file_format.fixed_strings([f"{shard}/{n}" for n in range(windows)]),
        offsets,
        np.arange(windows, dtype="<i4"),
    )
    attributes = provenance.attributes(
        "activations",
        kind="shard",
        shard=shard,
        first_row=first_row,
        precision=precision,
        run_fingerprint="bench",
        model_blocks=1,
        batch_tokens=4 * _WINDOW,
        chunk_size=_WINDOW,
        config={},
    )
    return ShardSpec(
        tokens, _POINTS, _WINDOW, precision, -(-windows // 4), f"bench-{shard}", attributes
    )


def write_shard(path: Path, requested: ShardSpec, rows: torch.Tensor) -> int:
    """Write a shard as the engine does; returns the bytes of its last commit."""
    windows = requested.windows
    with ShardWriter(path, requested) as writer:
        for batch in range(requested.batches):
            some = range(4 * batch, min(4 * batch + 4, windows))
            for point in requested.points:
                for window in some:
                    writer.write(window, point.name, 0, rows[window % 4])
            writer.batch_done((some.stop) * _WINDOW, last=batch == requested.batches - 1)
        writer.finish()
        return writer.commit_bytes


def write_plainly(path: Path, size: int, block: int, rows: torch.Tensor) -> None:
    """As many bytes in pieces of a window, fdatasync after every block: preallocated, as the
    writer's file is.
    """
    piece = element_types.raw_bytes(rows[0])
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.posix_fallocate(fd, 0, size)
    os.fsync(fd)
    done = since = 0
    while done < size:
        os.pwrite(fd, piece, done)
        done, since = done + len(piece), since + len(piece)
        if since >= block:
            os.fdatasync(fd)
            since = 0
    os.fdatasync(fd)
    os.close(fd)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python workflow/bench/store.py", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("results"), help="on the disk to measure"
    )
    parser.add_argument(
        "--mb", type=int, default=400, help="size of the shard and of the merged file"
    )
    parts = ("store", "many", "exports")
    parser.add_argument("--only", choices=parts, help="one part of the table")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder))
    lines = []
    try:
        if arguments.only in (None, "store"):
            lines += _writing(folder, arguments.mb)
            lines += _merging(folder, arguments.mb)
            lines += _reading(folder)
        if arguments.only in (None, "many"):
            lines += _many_shards(folder)
        if arguments.only in (None, "exports"):
            lines += _exporting(folder, arguments.mb)
    finally:
        shutil.rmtree(folder)
    print(table(lines, ["what", "ours", "plain", "", "ratio", "goal"], (1, 3, 4, 5)))


def _rows() -> torch.Tensor:
    return torch.randn(4, _WINDOW, _HIDDEN).to(torch.bfloat16)


def _writing(folder: Path, megabytes: int) -> list[list[str]]:
    rows = _rows()
    windows = max(4, megabytes * 10**6 // (2 * rows[0].nbytes))
    requested, size = spec(windows, 0), windows * 2 * rows[0].nbytes
    ours, plain = [], []
    block = write_shard(folder / "warm.h5", requested, rows)
    (folder / "warm.h5").unlink()
    for _ in range(_ROUNDS):
        os.sync()
        plain.append(seconds(lambda: write_plainly(folder / "plain", size, block, rows)))
        (folder / "plain").unlink()
        os.sync()
        ours.append(seconds(lambda: write_shard(folder / "s.h5", requested, rows)))
        (folder / "s.h5").unlink()
    what = f"write + fdatasync every {block >> 20} MiB"
    return [_line("shard writer", size, ours, what, plain, "0.8")]


def _merging(folder: Path, megabytes: int) -> list[list[str]]:
    rows, count = _rows(), 100
    windows = max(1, megabytes * 10**6 // (count * 2 * rows[0].nbytes))
    shards = []
    for number in range(count):
        shards.append(folder / f"{number:03d}.h5")
        write_shard(shards[-1], spec(windows, number, first_row=number * windows * _WINDOW), rows)
    size = sum(s.stat().st_size for s in shards)
    virtual, physical, copied = [], [], []
    for _ in range(_ROUNDS):
        os.sync()
        virtual.append(seconds(lambda: merge.merge_shards(shards, "virtual", folder / "v.h5")))
        os.sync()
        copied.append(seconds(lambda: _copied(shards, folder)))
        for s in shards:
            (folder / f"{s.name}.copy").unlink()
        os.sync()
        physical.append(
            seconds(lambda: merge.merge_shards(shards, "physical", folder / "activations.h5"))
        )
    return [
        ["virtual merge of 100 shards", f"{median(virtual):.3f} s", "", "", "", "< 0.1 s"],
        _line(
            "physical merge of 100 shards",
            size,
            physical,
            "cp and fsync of the shards",
            copied,
            "0.5",
        ),
    ]


def _copied(shards: list[Path], folder: Path) -> None:
    for shard in shards:
        shutil.copyfile(shard, folder / f"{shard.name}.copy")
        file_format.sync(folder / f"{shard.name}.copy")


def _reading(folder: Path) -> list[list[str]]:
    path = folder / "activations.h5"
    acts = activations.open_activations(path)
    hook = acts.hooks[0]
    np.save(folder / "rows.npy", acts[hook].numpy(...))
    total, batch = len(acts), 4096
    ours, mapped, single = [], [], []
    for round_ in range(_ROUNDS):
        ours.append(seconds(partial(_batches, acts, hook, batch, round_)))
        mapped.append(seconds(partial(_mapped_batches, folder / "rows.npy", batch, round_)))
        wanted = np.random.default_rng(round_).integers(0, total, 2000)
        row_by_row = seconds(partial(_single_rows, path, file_format.hook_path(hook), wanted))
        single.append(row_by_row * total / len(wanted))
    size = acts[hook].nbytes
    return [
        _line("shuffled batches", size, ours, "h5py, row by row at random", single, "5"),
        _line("shuffled batches", size, ours, "mapped .npy, same pattern", mapped, "0.5"),
    ]


def _many_shards(folder: Path, count: int = 1000) -> list[list[str]]:
    """Shuffled batches and scattered rows of so many shards, next to one file of the same rows."""
    rows, inside = _rows(), folder / "many"
    inside.mkdir()
    shards = [inside / f"{number:04d}.h5" for number in range(count)]
    for number, shard in enumerate(shards):
        write_shard(shard, spec(1, number, first_row=number * _WINDOW), rows)
    opened = {}
    for mode in ("virtual", "physical"):
        merge.merge_shards(shards, mode, inside / f"{mode}.h5")
        opened[mode] = activations.open_activations(inside / f"{mode}.h5")
    hook, total = opened["virtual"].hooks[0], len(opened["virtual"])
    took: dict[tuple[str, str], list[float]] = {}
    for round_ in range(1 + _ROUNDS):
        wanted = np.random.default_rng(round_).integers(0, total, 20_000)
        for mode, acts in opened.items():
            times = {
                "shuffled batches": seconds(partial(_batches, acts, hook, 4096, round_)),
                "20,000 rows at random": seconds(partial(acts[hook].__getitem__, wanted)),
            }
            for what, taken in times.items():
                if round_:  # pages are read from the disk in the first
                    took.setdefault((what, mode), []).append(taken)
    sizes = {"shuffled batches": opened["virtual"][hook].nbytes}
    sizes["20,000 rows at random"] = 20_000 * _HIDDEN * 2
    shutil.rmtree(inside)
    return [
        _line(
            f"{what} of {count:,} shards",
            size,
            took[what, "virtual"],
            "one file of the same rows",
            took[what, "physical"],
            "0.8",
        )
        for what, size in sizes.items()
    ]


def _exporting(folder: Path, megabytes: int) -> list[list[str]]:
    """Exports of both hook points, next to a copy of the file that has them.

    Both end with fsync: of the copy, and of each file of the export. Speeds are of the bytes that
    are written: Arrow lacks bfloat16, so that SAELens gets twice as many of it. The first round is
    left out: it imports datasets.
    """
    out, lines = folder / "exported", []
    for form, precision, options in (
        ("saelens", "fp32", {"context_size": _WINDOW}),
        ("saelens", "bf16", {"context_size": _WINDOW}),
        ("speculators", "bf16", {}),
    ):
        path = folder / f"{precision}.h5"
        if not path.exists():
            rows = _rows().to(torch_dtype(precision))
            windows = max(4, megabytes * 10**6 // (2 * rows[0].nbytes))
            write_shard(path, spec(windows, 0, precision), rows)
        acts = activations.open_activations(path)
        ours, copied = [], []
        for _ in range(1 + _ROUNDS):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            copied.append(seconds(partial(_copied, [path], folder)))
            (folder / f"{path.name}.copy").unlink()
            os.sync()
            ours.append(seconds(partial(export, acts, form, out, hooks=acts.hooks, **options)))
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        shutil.rmtree(out)
        what = f"{precision} rows to {form}, {written / 1e6:,.0f} MB"
        size = path.stat().st_size
        lines.append(_line(what, written, ours[1:], "cp and fsync", copied[1:], "0.5", size))
    return lines


def _batches(acts: activations.Activations, hook: str, batch: int, seed: int) -> None:
    for rows in acts.batches(hook, batch, shuffle=True, seed=seed):
        cast(torch.Tensor, rows).sum()


def _mapped_batches(path: Path, batch: int, seed: int) -> None:
    rows, random = np.load(path, mmap_mode="r"), np.random.default_rng(seed)
    blocks = random.permutation(len(rows) // BLOCK_ROWS) * BLOCK_ROWS
    for start in range(0, len(blocks), batch // BLOCK_ROWS * 4):
        buffer = np.concatenate(
            [rows[b : b + BLOCK_ROWS] for b in blocks[start : start + batch // BLOCK_ROWS * 4]]
        )
        order = random.permutation(len(buffer))
        for first in range(0, len(buffer), batch):
            torch.from_numpy(buffer[order[first : first + batch]]).view(torch.bfloat16).sum()


def _single_rows(path: Path, name: str, wanted: np.ndarray) -> None:
    with h5py.File(path, "r") as file:
        rows = file[name]
        for row in wanted.tolist():
            rows[row]


def _line(
    what: str,
    size: int,
    ours: list[float],
    other: str,
    others: list[float],
    wanted: str,
    its_size: int | None = None,
) -> list[str]:
    sizes = (size, its_size or size)
    speeds = [
        f"{bytes_ / median(times) / 1e9:.2f} GB/s"
        for bytes_, times in zip(sizes, (ours, others), strict=True)
    ]
    ratio = median(b / a for a, b in zip(ours, others, strict=True)) * sizes[0] / sizes[1]
    return [what, speeds[0], other, speeds[1], f"{ratio:.2f}", wanted]


if __name__ == "__main__":
    main()
