"""Changed files, by thousands: each reader ends in the project's own error, in a verdict of
verification, or in the rows that were written; never in a signal, a hang or a full memory.

300 changes by default; `THELOOM_FUZZ=5000 pytest -s tests/dataset/test_fuzz_files.py` makes as many
and prints how they ended. A change is of raw bytes, of the file's length, or of its structure; some
have their checksums written anew, as an attacker would: only these may give other rows.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import theloom
import torch
from shards import spec
from theloom.dataset import conversions, inspect
from theloom.dataset.merge import merge_shards
from theloom.errors import TheLoomError
from theloom.report.speed import shard_work
from theloom.store import checksums, file_format, index
from theloom.store.tables import tokens as token_tables
from theloom.store.tables.columns import Column
from theloom.store.writer import ShardWriter

CHANGES = int(os.environ.get("THELOOM_FUZZ", "300"))
MEMORY = 1 << 30  # more than the process has: the files have some ten thousand bytes
SECONDS = 20  # of processor time
TOGETHER = 25  # changes of a process: a fork costs more than a change

Kind = tuple[str, str]  # compression, and the file that is read

SAME, REFUSED, FOUND, OTHER_ROWS, UNEXPECTED = range(5)
ENDS = ("unchanged rows", "refused", "found by verification", "other rows", "another exception")


def write_shard(path: Path, number: int, compression: str) -> None:
    one = spec(fingerprint=f"run-{number}", lengths=[40, 7, 60], compression=compression)
    one.attributes.update(
        shard=number,
        first_row=number * one.rows,
        batch_tokens=64,
        chunk_size=64,
        run_fingerprint="run",
        config={"tokens": {}},
    )
    one.tokens.texts.update({int(i): f" word{i}" for i in one.tokens.input_ids})
    more = {
        name: (np.arange(one.rows) % 5).astype(kind) for name, kind in token_tables.TYPES.items()
    }
    if compression == "zstd":  # some tokens have a row
        more["row_token"] = more["kept"].nonzero()[0]
        one.attributes.update(first_row=number * len(more["row_token"]), rows_pool="none")
    one = dataclasses.replace(
        one, tokens=dataclasses.replace(one.tokens, columns=columns(number), **more)
    )
    made = torch.Generator().manual_seed(number)
    with ShardWriter(path, one) as writer:
        for window in range(3):
            length = int(np.diff(one.tokens.row_offset)[window])
            for point in one.points:
                rows = torch.randn(length, *point.row(one.keys), generator=made)
                writer.write(window, point.name, 0, rows)
            writer.batch_done(int(one.tokens.row_offset[window + 1]), last=window == 2)
        writer.finish()


def columns(number: int) -> dict[str, Column]:
    names = file_format.fixed_strings(["yes", "nö"])
    return {
        "n": Column("integer", np.arange(3) + number, None, np.array([0, 1, 0], "u1")),
        "c": Column("category", np.array([1, -1, 0], "<i4"), names),
        "s": Column("string", file_format.fixed_strings(["a", "ü", ""])),
        "j": Column("json", file_format.fixed_strings(["[1]", "{}", "null"])),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two shards and a virtual and a physical merge, of plain and of packed rows."""
    top = tmp_path_factory.mktemp("fuzz")
    for name in ("none", "zstd"):
        (top / name).mkdir()
        shards = [top / name / f"{number}.h5" for number in range(2)]
        for number, path in enumerate(shards):
            write_shard(path, number, name)
        for mode in ("virtual", "physical"):
            merge_shards(shards, mode, top / name / f"{mode}.h5")
    return top


def rows_of(acts: theloom.dataset.activations.Activations) -> list[bytes]:
    more = [acts.token_table(name) for name in token_tables.TYPES]
    tables = (acts.input_ids, acts.document_of, acts.position, *filter(None, more))
    everything = [acts[hook].numpy(...) for hook in acts.hooks] + [t.numpy(...) for t in tables]
    return [array.tobytes() for array in everything]


def read_all(path: Path, shard: bool) -> bytes:
    """What every reader of a file makes of it: a digest of its rows; None where verification finds
    damage.
    """
    acts = theloom.open(path)
    sound = not inspect.damaged_parts(acts) and not inspect.check_hashes(acts)[0]
    rows = rows_of(pickle.loads(pickle.dumps(acts)))
    inspect.summarize_hooks(acts), inspect.file_schema(acts), inspect.provenance_attributes(acts)
    assert str(acts)
    conversions.documents_frame(acts), conversions.tokens_frame(acts)
    acts.rows.to_dataframe()
    acts.select("last|[1:3]").mean(acts.hooks[0], by="document")
    for _ in acts.batches([*acts.hooks, "row", "input_ids"], 64, shuffle=True):
        pass
    if shard:
        shard_work(path)
        others = [path, path.with_name("1.h5")]
        merge_shards(others, "virtual", path.with_name("merged.h5"))
    values = {name: column.tolist() for name, column in acts.columns.items()}
    content = json.dumps([acts.documents, acts.document_offset.tolist(), acts.token_texts, values])
    return b"".join([*rows, content.encode()]) if sound else b""


def raw(path: Path, choose: random.Random) -> None:
    """Other bytes here and there, mostly in the metadata, where damage shows in a program."""
    data = bytearray(path.read_bytes())
    for _ in range(choose.choice([1, 1, 2, 8])):
        at = choose.randrange(len(data) if choose.random() < 0.3 else min(len(data), 60_000))
        match choose.randrange(4):
            case 0:
                data[at] ^= 1 << choose.randrange(8)
            case 1:
                data[at] = choose.choice([0, 1, 127, 128, 255])
            case 2:
                sizes = [0, 1 << 63, (1 << 64) - 1, 1 << 40, len(data), choose.randrange(len(data))]
                data[at : at + 8] = choose.choice(sizes).to_bytes(8, "little")
            case _:
                other, size = choose.randrange(len(data)), choose.choice([8, 16, 40])
                data[at : at + size] = data[other : other + size]
    path.write_bytes(data)


def length(path: Path, choose: random.Random) -> None:
    data = path.read_bytes()
    cut = choose.randrange(len(data))
    path.write_bytes(data[:cut] if choose.random() < 0.8 else data + data[:cut])


def names(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visititems(lambda n, item: found.append(n) if isinstance(item, h5py.Dataset) else None)
    return sorted(found)


def remove(file: h5py.File, choose: random.Random) -> None:
    if choose.random() < 0.5:
        del file.attrs[choose.choice(sorted(file.attrs))]
    else:
        del file[choose.choice([*names(file), "hooks", "tokens", "statistics"])]


def replace(file: h5py.File, choose: random.Random) -> None:
    """A dataset of another shape, type or layout."""
    name = choose.choice(names(file))
    shape = choose.choice([file[name].shape, (), (0,), (1 << 40,), (3, 1 << 30), (1, 1, 1, 1)])
    dtype = choose.choice(["<i4", ">i8", "<f8", "S5", "u1", h5py.string_dtype()])
    del file[name]
    chunks = True if shape and choose.random() < 0.5 else None
    if np.prod(shape, dtype=float) * 8 > 1 << 20:
        chunks = tuple(min(n, 1 << 18) for n in shape)
    file.create_dataset(name, shape, dtype, chunks=chunks)


def table(file: h5py.File, choose: random.Random) -> None:
    """Other numbers in a table."""
    tables = [n for n in names(file) if file[n].dtype.kind in "iuf" and n != index.INDEX]
    dataset = file[choose.choice([n for n in tables if not file[n].is_virtual])]
    if dataset.size:
        values = dataset[...].reshape(-1)
        at = choose.randrange(len(values))
        if dataset.dtype.kind == "f":
            values[at] = choose.choice([np.nan, np.inf, -1.0, 1e300])
        else:
            low, high = np.iinfo(dataset.dtype).min, np.iinfo(dataset.dtype).max
            values[at] = choose.choice([0, low, high, 1, high // 2, choose.randrange(1000)])
        dataset[...] = values.reshape(dataset.shape)


def attribute(file: h5py.File, choose: random.Random) -> None:
    values = ["", "x", "[" * 10_000, "{}", "[1]", "null", 1 << 62, -1, 0.5, np.zeros(9), b"\xff"]
    name = choose.choice(sorted(file.attrs))
    del file.attrs[name]
    file.attrs[name] = choose.choice(values)


def link(file: h5py.File, choose: random.Random) -> None:
    name = choose.choice(names(file))
    new = [h5py.SoftLink("/"), h5py.SoftLink("/" + name), h5py.ExternalLink("physical.h5", name)]
    kept = file[name]
    if choose.random() < 0.5:
        file["another"] = choose.choice([kept, file["/"], *new])
    else:
        del file[name]
        file[name] = choose.choice([file["/"], file["tokens"], *new])


def itself(file: h5py.File, choose: random.Random) -> None:
    """A virtual dataset over the file itself."""
    name = choose.choice(names(file))
    shape, dtype = file[name].shape or (1,), file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape, dtype)
    source = choose.choice([".", Path(file.filename).name])
    layout[:] = h5py.VirtualSource(source, name, shape)
    file.create_virtual_dataset(name, layout)


def deep(file: h5py.File, choose: random.Random) -> None:
    group = file
    for _ in range(choose.choice([1, 2, 3, 300])):
        group = group.create_group("g")


def packed(file: h5py.File, choose: random.Random) -> None:
    """A chunk that states another size, or is cut."""
    for name in [n for n in names(file) if file[n].chunks]:
        data = bytearray(file[name].id.read_direct_chunk((0,) * file[name].ndim)[1])
        data[4:13] = choose.randbytes(9)  # the header of the frame
        file[name].id.write_direct_chunk((0,) * file[name].ndim, bytes(data))


def listed(file: h5py.File, choose: random.Random) -> None:
    """Another number in the index."""
    content = json.loads(file[index.INDEX][:].tobytes())
    entry = content["datasets"][choose.choice(sorted(content["datasets"]))]
    other = choose.choice([-1, 0, 1 << 40, 1 << 80, "x", None, [], 1e300])
    field = choose.randrange(4)
    entry[field] = choose.choice([other, [other], [[other, other]], [[0, 1 << 30]]])
    del file[index.INDEX]
    file[index.INDEX] = np.frombuffer(json.dumps(content).encode(), "u1")


STRUCTURES = [remove, replace, table, attribute, link, itself, deep, packed, listed]


def change(path: Path, choose: random.Random) -> bool:
    """Change a file; returns whether its checksums were written anew."""
    kind = choose.choice([raw, raw, length, "structure", "structure"])
    if kind != "structure":
        kind(path, choose)
        anew = kind is raw and choose.random() < 0.4
    else:
        structure, anew = choose.choice(STRUCTURES), True
        with h5py.File(path, "a") as file:
            with contextlib.suppress(*file_format.DAMAGE):  # HDF5 does not do all that is chosen
                structure(file, choose)
            if structure is not listed and choose.random() < 0.7:
                with contextlib.suppress(Exception):
                    index.write_index(file)
    if anew:
        with contextlib.suppress(*file_format.DAMAGE):
            checksums.write_checksums(path, *checksums.ALL)
    return anew


def limited() -> None:
    """Limit what the next change may take."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    used = int(time.process_time())
    for kind, most in (
        (resource.RLIMIT_AS, size + MEMORY),
        (resource.RLIMIT_CPU, used + SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    signal.alarm(10 * SECONDS)  # where it waits, other jobs may slow it down


def end_of(path: Path, shard: bool, expected: bytes) -> int:
    try:
        found = read_all(path, shard)
    except TheLoomError as error:
        return REFUSED if "\n" not in str(error) else UNEXPECTED
    except BaseException:
        traceback.print_exc()
        return UNEXPECTED
    return SAME if found == expected else OTHER_ROWS if found else FOUND


def end_of_change(number: int, folder: Path, place: Path, expected: dict[Kind, bytes]) -> int:
    """Change files in a folder of their own: no handle that an earlier change has left is of them.

    Returns how it ended, and 8 more where checksums were written anew.
    """
    kind, changed, choose = chosen(number, [*expected])
    try:
        place.mkdir()
        for file in folder.joinpath(kind[0]).glob("*.h5"):
            shutil.copyfile(file, place / file.name)
        anew = change(place / changed, choose)
        limited()
        return end_of(place / kind[1], kind[1] == "0.h5", expected[kind]) + 8 * anew
    except BaseException:
        traceback.print_exc()
        return UNEXPECTED
    finally:
        shutil.rmtree(place)


def chosen(number: int, kinds: list[Kind]) -> tuple[Kind, str, random.Random]:
    """Of a change, the file that is read, the one that is changed, and what draws the rest."""
    choose = random.Random(number)
    kind = choose.choice(kinds)
    # in a virtual dataset, half of the changes are of its shard
    changed = "0.h5" if kind[1] == "virtual.h5" and choose.random() < 0.5 else kind[1]
    return kind, changed, choose


def ends_of(work: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Each change, and how it ended in a process that makes several, or minus the signal that ended
    the process; another one makes the rest.
    """
    numbers = range(CHANGES)
    while numbers:
        together = numbers[:TOGETHER]
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                for number in together:
                    os.write(writing, bytes([work(number)]))
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as answers:  # noqa: PTH123  of a descriptor
            found = [*answers.read()]
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if len(found) < len(together):
            found.append(ended if ended < 0 else UNEXPECTED)
        yield from zip(together, found, strict=False)
        numbers = numbers[len(found) :]


def test_no_change_of_a_file_is_worse_than_an_error(folder, tmp_path):
    kinds = [(c, f) for c in ("none", "zstd") for f in ("0.h5", "virtual.h5", "physical.h5")]
    expected = {kind: read_all(folder.joinpath(*kind), kind[1] == "0.h5") for kind in kinds}
    assert all(expected.values())
    counts: Counter[str] = Counter()
    wrong = []
    for number, ended in ends_of(lambda n: end_of_change(n, folder, tmp_path / f"{n}", expected)):
        kind, anew, status = chosen(number, kinds)[0], *divmod(max(0, ended), 8)
        if ended < 0:
            wrong.append(f"change {number} of {kind}: signal {-ended}")
        elif status == UNEXPECTED or (status == OTHER_ROWS and not anew):
            wrong.append(f"change {number} of {kind}: {ENDS[status]}")
        counts[f"{ENDS[status]}{', checksums anew' * anew}"] += 1
    print(f"\n{CHANGES} changes: " + "; ".join(f"{n} {name}" for name, n in counts.most_common()))
    assert not wrong
    assert counts["refused"] > CHANGES / 10
    assert counts["refused, checksums anew"] > CHANGES / 10
    assert counts["found by verification"] > CHANGES / 100
