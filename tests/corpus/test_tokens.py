"""Windows, positions, shards of documents, and the tokens of real text against the tokenizer
itself.
"""

import h5py
import numpy as np
import pytest
import xxhash
from support import a_config
from theloom.corpus import tokens, windows
from theloom.corpus.rows import Document
from theloom.corpus.spooled import spool
from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.corpus.tokens import tokenize
from theloom.corpus.tokens_file import reading
from theloom.corpus.tokens_file.reading import read_job
from theloom.corpus.windows import plan_shards, positions, split_windows, write_tables
from theloom.errors import ConfigError, CorpusError
from theloom.store import file_format
from theloom.store.hdf5 import spool as bytes_spool
from transformers import AutoTokenizer


@pytest.mark.parametrize("context", [0, 1, 3, 7, 100])
def test_windows_cover_every_document_in_order(context):
    lengths = np.array([1, 7, 14, 15, 3])
    window_lengths, document = split_windows(lengths, context)
    assert np.array_equal(np.bincount(document, weights=window_lengths), lengths)
    assert np.array_equal(document, np.sort(document))
    assert window_lengths.min() > 0
    if context:
        assert window_lengths.max() <= context
        assert len(window_lengths) == sum(-(-n // context) for n in lengths)


def test_positions_start_again_in_every_window():
    (found,) = positions(np.array([0, 3, 4, 6]))
    assert found.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize(("piece", "context"), [(1, 3), (7, 0), (64, 5), (10_000, 1)])
def test_tables_are_the_same_in_pieces_of_any_length(tmp_path, monkeypatch, piece, context):
    """Against NumPy over all tokens at once."""
    monkeypatch.setattr(windows, "_PIECE", piece)
    monkeypatch.setattr(windows, "_OFFSETS", piece)
    monkeypatch.setattr(spool, "_TEXTS", piece)
    monkeypatch.setattr(spool, "_NUMBERS", piece)
    monkeypatch.setattr(bytes_spool, "_SPOOLED", 8 * piece)
    lengths = np.random.default_rng(0).integers(1, 40, 30)
    ids, hashes, tokens_of = Strings(), Strings(), Numbers()
    tokens_of.extend(lengths)
    for number, length in enumerate(lengths):
        ids.append("é" * (number % 5) + str(number))
        hashes.append(f"{length:032x}")
    with h5py.File(tmp_path / "tables.h5", "w") as file:
        write_tables(file, ids, hashes, tokens_of, context, 4)
        document = np.repeat(np.arange(30), lengths)
        within = np.concatenate([np.arange(n) % (context or n) for n in lengths])
        assert np.array_equal(file["tokens/document"][:], document)
        assert np.array_equal(file["tokens/position"][:], within)
        offsets = np.append(0, np.cumsum(lengths))
        assert np.array_equal(file["documents/offset"][:], offsets)
        split, document_of = split_windows(lengths, context)
        assert np.array_equal(file["windows/offset"][:], np.append(0, np.cumsum(split)))
        assert np.array_equal(file["windows/document"][:], document_of)
        nearest = [int(np.abs(offsets - offsets[-1] * n / 4).argmin()) for n in (1, 2, 3)]
        assert file["shards/first_document"][:].tolist() == [0, *nearest, 30]
        names = ["é" * (n % 5) + str(n) for n in range(30)]
        assert [name.decode() for name in file["documents/id"][:].tolist()] == names
        assert file["documents/id"].dtype == file_format.fixed_strings(names).dtype
        assert file["documents/text_hash"][:].tolist() == [b"%032x" % n for n in lengths]
        assert file["tokens/position"].chunks is None  # contiguous
        assert ids.digest() == xxhash.xxh3_128_hexdigest("".join(names).encode())
        ids.write(file, "kept")
        twice = Strings()
        for _ in range(2):
            twice.extend(file["kept"][:], file["kept_end"][:])
        found = np.concatenate([*twice.pieces()])
        assert [name.decode() for name in found.tolist()] == 2 * names


@pytest.mark.parametrize("piece", [1, 3, 1 << 16])
def test_a_document_belongs_to_the_shard_whose_cut_is_nearest(monkeypatch, piece):
    monkeypatch.setattr(windows, "_OFFSETS", piece)
    rng = np.random.default_rng(1)
    for _ in range(200):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 9, rng.integers(1, 40)))])
        shards = int(rng.integers(1, 12))
        targets = np.arange(1, shards) * (offsets[-1] / shards)
        nearest = [int(np.abs(offsets - target).argmin()) for target in targets]
        assert plan_shards(offsets, shards).tolist() == [0, *nearest, len(offsets) - 1]


def test_groups_for_the_tokenizer_are_bounded_in_characters(monkeypatch):
    monkeypatch.setattr(tokens, "_CHARACTERS", 100)
    made = [Document(str(n), "x" * (n % 90), "") for n in range(1000)]
    groups = list(tokens._groups(iter(made)))
    assert [d for group in groups for d in group] == made
    assert len(groups[0]) == 64  # class and file are compared over the first texts
    assert all(sum(len(d.text) for d in group[:-1]) < 100 for group in groups[1:])


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 9])
def test_shards_are_ranges_of_whole_documents_nearly_equal_in_tokens(shards):
    lengths = np.random.default_rng(0).integers(1, 1000, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cuts = plan_shards(offsets, shards)
    assert cuts[0] == 0
    assert cuts[-1] == 200
    assert len(cuts) == shards + 1
    sizes = np.diff(offsets[cuts])
    assert sizes.max() - sizes.min() <= 2 * lengths.max()


def test_fewer_documents_than_shards_leave_some_empty():
    assert np.diff(plan_shards(np.array([0, 10, 20]), 5)).sum() == 2
    assert len(plan_shards(np.array([0, 10]), 4)) == 5


def write_texts(folder, texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("shards", [1, 2, 4, 6])
def test_window_lengths_are_those_of_each_shard(tmp_path, tiny_llama, shards, monkeypatch):
    texts = {"a.txt": "One two three.", "b.txt": "word " * 500, "c.txt": "x", "d.txt": "word " * 90}
    folder, path = write_texts(tmp_path / "texts", texts), tmp_path / "tokens.h5"
    requested = (
        f"corpus=text corpus.path={folder} corpus.context_length=100 extraction.shards={shards}"
    )
    tokenize(a_config(tiny_llama, requested), path)
    monkeypatch.setattr(reading, "_WINDOWS", 2)  # read in pieces
    found, parts = reading.window_lengths(path), [read_job(path, n).shard for n in range(shards)]
    assert [np.repeat(*counted).tolist() for counted in found.shards] == [
        np.sort(np.diff(part.window_offset)).tolist() for part in parts
    ]
    assert found.longest == read_job(path, 0).longest_window == 100
    assert found.tokens == max(len(part.input_ids) for part in parts)


def test_tokens_are_those_of_the_tokenizer(tmp_path, tiny_llama):
    texts = {"a.txt": "One two three.", "b.md": "x", "c.txt": "", "d.txt": "word " * 500}
    folder = write_texts(tmp_path / "texts", texts)
    tokenize(
        a_config(tiny_llama, f"corpus=text corpus.path={folder} extraction.shards=2"),
        tmp_path / "tokens.h5",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = [tokenizer(t)["input_ids"] for t in texts.values() if t]
    with file_format.open_h5(tmp_path / "tokens.h5", "tokens") as file:
        assert file["tokens/input_ids"][:].tolist() == np.concatenate(expected).tolist()
        assert file["documents/id"][:].tolist() == [b"a.txt", b"b.md", b"d.txt"]
        assert np.diff(file["documents/offset"][:]).tolist() == [len(e) for e in expected]
        assert file.attrs["empty_documents"] == 1
        # the model's context is 256 tokens: the long document is split, and nothing of it is lost
        assert np.diff(file["windows/offset"][:]).tolist() == [
            len(expected[0]),
            len(expected[1]),
            256,
            245,
        ]
        assert file["windows/document"][:].tolist() == [0, 1, 2, 2]
    parts = [read_job(tmp_path / "tokens.h5", n).shard for n in range(2)]
    assert (
        np.concatenate([p.input_ids for p in parts]).tolist() == np.concatenate(expected).tolist()
    )
    assert [p.first_row for p in parts] == [0, len(parts[0].input_ids)]
    for part in parts:
        assert part.window_offset[0] == part.document_offset[0] == 0
        assert part.window_offset[-1] == part.document_offset[-1] == len(part.input_ids)
        assert len(part.window_offset) == len(part.window_document) + 1


def test_max_tokens_is_exact_and_the_cut_is_recorded(tmp_path, tiny_llama, caplog):
    folder = write_texts(
        tmp_path / "texts", {"a.txt": "word " * 30, "b.txt": "word " * 50, "c.txt": "never read"}
    )
    tokenize(
        a_config(tiny_llama, f"corpus=text corpus.path={folder} corpus.max_tokens=60"),
        tmp_path / "tokens.h5",
    )
    attributes = reading.attributes(tmp_path / "tokens.h5")
    with file_format.open_h5(tmp_path / "tokens.h5", "tokens") as file:
        assert len(file["tokens/input_ids"]) == 60
        assert len(file["documents/id"]) == 2
    assert attributes["truncated_from"] > 20
    assert "b.txt is cut" in caplog.text


def test_max_documents_limits_the_documents(tmp_path, tiny_llama):
    tokenize(a_config(tiny_llama, "corpus.max_documents=3"), tmp_path / "tokens.h5")
    with file_format.open_h5(tmp_path / "tokens.h5", "tokens") as file:
        assert file["documents/id"].shape == (3,)


def test_a_corpus_of_empty_documents_is_refused(tmp_path, tiny_llama):
    folder = write_texts(tmp_path / "texts", {"a.txt": "", "b.txt": ""})
    with pytest.raises(CorpusError, match="2 documents read, all empty"):
        tokenize(a_config(tiny_llama, f"corpus=text corpus.path={folder}"), tmp_path / "tokens.h5")


def test_a_corpus_of_no_documents_is_refused(tmp_path, tiny_llama):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match="no tokens: no documents"):
        tokenize(
            a_config(tiny_llama, f"corpus=text corpus.path={tmp_path}"), tmp_path / "tokens.h5"
        )


def test_a_context_beyond_the_model_is_refused(tmp_path, tiny_llama):
    with pytest.raises(
        ConfigError, match=r"corpus\.context_length: 1000 is more than the model's 256"
    ):
        tokenize(a_config(tiny_llama, "corpus.context_length=1000"), tmp_path / "tokens.h5")


def test_a_model_without_tokenizer_is_refused(tmp_path):
    from support import build_tiny

    model = build_tiny("llama", tmp_path / "m")
    with pytest.raises(CorpusError, match=r"model\.tokenizer"):
        tokenize(a_config(model), tmp_path / "tokens.h5")
