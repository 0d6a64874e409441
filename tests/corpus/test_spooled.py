"""Lists of which memory holds a part: against Python's own."""

import json
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from support import a_config, build_tiny, peak_of
from theloom.corpus import kept, tokens, windows
from theloom.corpus.in_parts import gather
from theloom.corpus.in_parts.part import tokenize_part
from theloom.corpus.spooled import ids, spool, values
from theloom.corpus.spooled.files import Files
from theloom.corpus.spooled.ids import SeenIds
from theloom.corpus.spooled.spool import Numbers
from theloom.corpus.spooled.values import TYPES, StoredValues, ValueSpool
from theloom.corpus.tokens_file import growing, reading
from theloom.pipeline import job
from theloom.store.hdf5 import spool as bytes_spool
from theloom.store.hdf5.spool import Spool


@pytest.mark.parametrize("size", [8, 24, 1 << 20])
def test_bytes_are_read_back_from_memory_and_disk(monkeypatch, size):
    monkeypatch.setattr(bytes_spool, "_SPOOLED", size)
    rng, whole, found = random.Random(0), b"", Spool()
    for _ in range(200):
        more = rng.randbytes(rng.randrange(20))
        found.add(more)
        whole += more
        a, b = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        assert found.read(a, b) == whole[a:b]
        assert b"".join(found.pieces(b)) == whole[:b]
    assert len(found) == len(whole)


def test_integers_are_those_that_came(monkeypatch):
    monkeypatch.setattr(bytes_spool, "_SPOOLED", 64)
    expected = [*range(-50, 50), -(2**63), 2**63 - 1]
    numbers = Numbers()
    for number in expected[:60]:
        numbers.append(number)
    numbers.extend(np.array(expected[60:]))
    for size in (1, 7, 1000, None):
        pieces = list(numbers.pieces(size))
        assert np.concatenate(pieces).tolist() == expected
        assert size is None or max(map(len, pieces)) <= size
    assert (len(numbers), numbers.total) == (len(expected), sum(expected))


def test_ids_are_those_of_a_set_beyond_their_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(ids, "_CACHE", 64)  # KiB, of some 500 that they take
    rng, known, seen = random.Random(1), {}, SeenIds()
    for _ in range(20_000):
        name = f"é{rng.randrange(15_000)}"
        assert (name in seen) == (name in known)
        assert seen.add(name) == (name not in known)
        assert seen.number(name) == known.setdefault(name, 1)
        if rng.random() < 0.1:
            known[name] = rng.randrange(9)
            seen.set_number(name, known[name])
    assert all(seen.number(name) == number for name, number in known.items())


def test_a_full_disk_of_ids_is_reported_as_one(tmp_path):
    seen = SeenIds()
    seen._table.execute("PRAGMA max_page_count=20")  # as a disk of 80 kB
    with pytest.raises(OSError, match="No space left on device") as caught:
        all(map(seen.add, map(str, range(100_000))))
    assert "free disk space" in job.of_system(caught.value, tmp_path)


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_values_are_written_and_read_in_any_pieces(monkeypatch, tmp_path, together):
    monkeypatch.setattr(values, "_TOGETHER", together)
    rng, found, expected = random.Random(2), ValueSpool(), []
    for n in range(40):
        expected.append((rng.choice(TYPES), rng.randrange(-(2**63), 2**63), "é" * (n % 4)))
        found.add(*expected[-1])
    first, names = [("integer", "row 3", 3), ("float", "row 35", 35)], [("a", 0), ("b", 36)]
    again = ValueSpool()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        found.write(file.create_group("c"), 36, first, names)
        stored = StoredValues(file["c"])
        for start, stop in ((0, 5), (5, 5), (5, 36)):
            part = stored.read(start, stop)
            again.extend(part)
            kept = [(k, p, n - start) for k, p, n in first if start <= n < stop]
            assert part.first == kept
        assert stored.read(0, 36).names == [("a", 0)]
    for spooled, count in ((found, 40), (again, 36)):
        rows = [row for piece in spooled.pieces() for row in zip(*piece, strict=True)]
        assert [(kind, number, text) for kind, number, _, text in rows] == expected[:count]
        reals = np.array([n for _, n, _ in expected[:count]]).view("<f8")
        assert np.array_equal([r for _, _, r, _ in rows], reals, equal_nan=True)


def test_files_are_in_the_order_of_their_paths():
    rng = random.Random(3)
    names = {
        "/".join(rng.choices(("a", "a.b", "a-b", "é", "B", "a "), k=n % 4 + 1)) for n in range(300)
    }
    files = Files(Path("/x"), rng.sample([*names], len(names)))
    assert list(files) == sorted(Path("/x", name) for name in names)
    assert [f"/x/{name}" for name in files.names()] == [str(path) for path in files]
    assert list(files[3:9]) == list(files)[3:9]


@pytest.fixture
def small_pieces(monkeypatch):
    """What is held in memory at once is so little that a test's corpus has many times as much."""
    for module, name in (
        *((bytes_spool, "_SPOOLED"), (spool, "_TEXTS"), (spool, "_NUMBERS"), (values, "_TOGETHER")),
        *((windows, "_PIECE"), (windows, "_OFFSETS"), (growing, "_BUFFERED"), (growing, "_HASHED")),
        *((gather, "_PIECE"), (gather, "_DOCUMENTS"), (kept, "_AT_ONCE"), (reading, "_WINDOWS")),
    ):
        monkeypatch.setattr(module, name, 1 << 9)


@pytest.mark.usefixtures("small_pieces")
def test_memory_does_not_grow_with_the_documents(tmp_path):
    """A list of integers would take 32 bytes a document, one of ids and labels 150."""
    model = build_tiny("llama", tmp_path / "m", vocab_size=320)
    peaks: dict[str, list[int]] = {}
    # what the first call imports is not counted; of the last two, what happened to be freed late
    for count in (2500, 2500, 5500, 5500):
        file = tmp_path / f"{count}.jsonl"
        rows = ({"ids": [n % 99, 1], "key": f"k{n:05}", "n": n, "s": f"s{n}"} for n in range(count))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = a_config(
            model,
            f"corpus=text corpus.path={file} corpus.input_ids=ids corpus.id_column=key "
            "corpus.columns=[n,s] corpus.max_tokens=null extraction.shards=250 "
            "corpus.context_length=1 rows.keep=last",
        )
        parts = [tmp_path / f"part{n}.h5" for n in range(2)]
        output = tmp_path / "tokens.h5"
        for name, work, *arguments in (
            ("one job", tokens.tokenize, config, output),
            ("a part", tokenize_part, config, 0, 2, parts[0]),
            ("the last part", tokenize_part, config, 1, 2, parts[1]),
            ("their gather", gather.gather, config, parts, output),
            ("an extraction's tokens", reading.read_job, output, 249),
        ):
            peaks.setdefault(name, []).append(peak_of(work, *arguments))
        job_of_last = reading.read_job(output, 249)
        assert job_of_last.shard.columns["n"].tolist()[-1] == count - 1
        assert job_of_last.longest_window == 1
    grown = {name: (min(found[2:]) - found[1]) / 3000 for name, found in peaks.items()}
    assert {name: bytes_ for name, bytes_ in grown.items() if bytes_ > 12} == {}
