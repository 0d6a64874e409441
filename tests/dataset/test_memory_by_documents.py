"""What merging, opening and checking a dataset hold in memory for each of its documents."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import theloom
import torch
from shards import spec
from support import peak_of
from theloom.dataset import inspect, reader
from theloom.dataset.inspect import check_hashes
from theloom.dataset.merge import merge_shards
from theloom.dataset.merging import joined
from theloom.store import checksums, index
from theloom.store.hdf5 import spool
from theloom.store.writer import ShardWriter
from theloom.verification.choice import choose_windows

DOCUMENTS = 500  # of a shard, each of one token


def write_shard(path: Path, number: int, documents: int = DOCUMENTS, tokens: int = 1) -> Path:
    """A shard by the writer itself."""
    one = spec(fingerprint=f"run-{number}", lengths=[tokens] * documents, batches=1)
    first = number * documents * tokens
    one = dataclasses.replace(one, tokens=dataclasses.replace(one.tokens, first_row=first))
    one.attributes.update(shard=number, first_row=first, batch_tokens=64, chunk_size=8)
    one.attributes.update(run_fingerprint="run")
    with ShardWriter(path, one) as writer:
        for point in one.points:
            for document in range(documents):
                rows = torch.full((tokens, 8), float(first + document))
                writer.write(document, point.name, 0, rows)
        writer.batch_done(one.rows, last=True)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    return [write_shard(folder / f"{number}.h5", number) for number in range(9)]


def test_few_bytes_of_each_document_are_held(shards, monkeypatch):
    """Ids take 4 bytes here, documents' and windows' offsets 8 each, two hook points' hashes 16,
    numbers of documents 4. An integer of Python's would take 32.
    """
    for module, name in (
        *((spool, "_SPOOLED"), (joined, "_ENTRIES"), (checksums, "_READ_AT_ONCE")),
        *((index, "_AT_ONCE"), (reader, "_TOGETHER")),
    ):
        monkeypatch.setattr(module, name, 1 << 9)  # what is read or written together
    peaks: dict[str, list[int]] = {}
    # what the first call imports is not counted; of the last two, what happened to be freed late
    for count in (3, 3, 9, 9):
        output = shards[0].with_name(f"merged-of-{count}.h5")
        peaks.setdefault("merge", []).append(
            peak_of(merge_shards, shards[:count], "virtual", output)
        )
        peaks.setdefault("open", []).append(peak_of(theloom.open, output))
        acts = theloom.open(output)
        peaks.setdefault("choose", []).append(peak_of(choose_windows, acts, 4, 0, (1,)))
        peaks.setdefault("check", []).append(peak_of(check_hashes, acts))
        assert check_hashes(acts)[0] == []
        assert acts.document_id_of(acts.document_count - 1) == f"d{DOCUMENTS - 1}"
        assert acts[acts.hooks[-1]][:, 0].tolist() == list(range(count * DOCUMENTS))
        ends = DOCUMENTS * np.arange(1, count + 1)
        assert acts.document_tokens[ends].tolist() == ends.tolist()
    grown = {name: (min(found[2:]) - found[1]) / (6 * DOCUMENTS) for name, found in peaks.items()}
    allowed = {"merge": 8, "open": 44, "choose": 24, "check": 8}
    assert {name: n for name, n in grown.items() if n > allowed[name]} == {}, grown


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    maps = Path("/proc/self/smaps").read_text().splitlines()
    found = (n for n, line in enumerate(maps) if line.endswith(str(path)))
    kilobytes = (next(x for x in maps[n:] if x.startswith("Rss:")).split()[1] for n in found)
    return 1024 * sum(map(int, kilobytes))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_were_checked_are_not_held(tmp_path, monkeypatch, threads):
    path = write_shard(tmp_path / "0.h5", 0, documents=60, tokens=2000)
    acts = theloom.open(path)
    size = sum(acts[hook].nbytes for hook in acts.hooks)
    assert check_hashes(acts, threads=threads)[0] == []
    assert resident(path) > size / 2  # all of it may stay while it is small
    monkeypatch.setattr(inspect, "_HELD", 1 << 18)
    assert check_hashes(acts, threads=threads)[0] == []
    assert resident(path) < size / 4
    assert acts[acts.hooks[0]][-1].tolist() == [59.0] * 8
