"""The page on the file format lists exactly what is written, and files of every released version
can be read.

`released/activations-format-1-bf16.h5` was written by 0.1.0, as `released/make.py` does: the last
block of a tiny Llama over 290 tokens, merged physically. A new version of the format adds a file
there, and removes none.
"""

import itertools
import re
import shutil
from pathlib import Path

import h5py
import pytest
import theloom
import torch
import xxhash
from shards import POINTS, spec
from support import ROOT, stages
from theloom.dataset import inspect
from theloom.dataset.merge import merge_shards
from theloom.errors import StoreError
from theloom.store import file_format
from theloom.store.writer import ShardWriter

RELEASED = sorted((Path(__file__).parents[1] / "released").glob("activations-format-*.h5"))
PAGE = (ROOT / "workflow/docs/file-format.md").read_text(encoding="utf-8")
TYPES = {"int32": "<i4", "int64": "<i8", "uint8": "|u1", "uint32": "<u4", "uint64": "<u8"}
TYPES["float64"] = "<f8"
# of runs with corpus.messages and corpus.columns alone
CONVERSATIONS = ("tokens/role", "tokens/message")
OF_OTHERS = r"`answers\.h5` only|with `answers\.source|with `(model\.adapter|corpus\.target)` only"
OF_OTHERS += r"|with `resources\.tokenize_jobs` only|rows with a scale only"
OF_OTHERS += "|of a decoder behind an encoder( of audio)? only"
OF_OTHERS += "|of (images and audio|conversations with images) only"
COLUMNS = tuple(f"documents/{group}/<name>" for group in ("columns", "null", "categories"))


def documented(table: str) -> list[tuple[list[str], str]]:
    """The rows of a table of the page: the names in the first column, and the other columns."""
    lines = PAGE.split(f"<!-- {table} -->\n")[1].splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))[2:]
    return [(re.findall("`(.+?)`", row.split("|")[1]), row.split("|", 2)[2]) for row in rows]


def documented_names(table: str, kind: str, some_rows: bool = False) -> set[str]:
    """Those that a file of this kind has: `shard`, `virtual` or `physical`; of every token's rows,
    or of some.
    """
    of_others = {"shard": "(virtual|merged) datasets? only", "virtual": "shards only"}
    absent = of_others.get(kind, "shards only|virtual datasets only")
    absent += f"|{OF_OTHERS}" + ("" if some_rows else "|with `rows.keep` or `rows.pool` only")
    return {n for names, text in documented(table) if not re.search(absent, text) for n in names}


def datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All of a file, by name; the hook points' as the page writes them."""
    result: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            result[re.sub(r"hooks/[^/]+/", "hooks/<name>/", name)] = item

    file.visititems(visit)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    requested = "corpus.max_tokens=300 corpus.context_length=120 extraction.shards=2"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, requested).all()


@pytest.fixture(scope="module")
def of_some(tmp_path_factory, tiny_llama):
    requested = "corpus.max_tokens=300 extraction.shards=2 rows.keep=last"
    return stages(tmp_path_factory.mktemp("some"), tiny_llama, requested).all()


@pytest.mark.parametrize("which", ["run", "of_some"])
@pytest.mark.parametrize("kind", ["shard", "virtual", "physical"])
def test_the_page_lists_every_dataset_and_attribute_and_no_other(which, kind, tmp_path, request):
    run, some_rows = request.getfixturevalue(which), which == "of_some"
    merge_shards(run.shards, "physical", tmp_path / "activations.h5")
    paths = {"shard": run.shards[0], "virtual": run.activations}
    with h5py.File(paths.get(kind, tmp_path / "activations.h5")) as file:
        assert file.attrs["kind"] == kind
        stored = datasets(file)
        expected = documented_names("datasets of theloom.activations", kind, some_rows)
        assert set(stored) == {n for n in expected if n not in CONVERSATIONS + COLUMNS}
        attributes = documented_names("attributes of theloom.activations", kind, some_rows)
        assert set(file.attrs) == attributes - {"compression"}
        for names, text in documented("datasets of theloom.activations"):
            expected = TYPES.get(re.split(r"\W", text.strip())[0])
            for name in {*names} & {*stored}:
                assert expected is None or stored[name].dtype.str == expected, name
    assert {"index", "checksums", "metrics"} <= set(stored)


@pytest.mark.parametrize("which", ["run", "of_some"])
def test_the_page_lists_all_of_tokens_h5(which, request):
    run, some_rows = request.getfixturevalue(which), which == "of_some"
    with h5py.File(run.folder / "tokens.h5") as file:
        expected = documented_names("datasets of theloom.tokens", "physical", some_rows)
        assert set(datasets(file)) == {n for n in expected if n not in CONVERSATIONS + COLUMNS}
        attributes = documented_names("attributes of theloom.tokens", "physical", some_rows)
        assert set(file.attrs) == attributes


def test_the_page_lists_the_metrics_in_their_order():
    assert [names for names, _ in documented("metrics")] == [[n] for n in file_format.METRICS]


def test_the_page_names_the_fields_of_the_log_and_compression(tmp_path):
    with ShardWriter(tmp_path / "s.h5", spec(lengths=[4], compression="zstd")) as writer:
        for point in POINTS:
            writer.write(0, point.name, 0, torch.zeros(4, 8))
        writer.batch_done(4, last=True)
        writer.finish()
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.attrs["compression"] == "zstd"
        fields = ", ".join(f"`{name}`" for name in file["commit_log"].dtype.names)
    assert f"four uint64 for every batch: {fields}." in " ".join(PAGE.split())


def test_the_page_s_reader_reads_a_real_file(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results/smollm2-135m"
    folder.mkdir(parents=True)
    shutil.copy(RELEASED[0], folder / "activations.h5")
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)[0], {})
    expected = "pydoc_data.topics/assignment blocks.1.hook_resid_post (30, 32) float32"
    assert capsys.readouterr().out.strip() == expected


def test_there_is_a_file_of_every_version_up_to_this_one():
    versions = {h5py.File(path, "r").attrs["format_version"] for path in RELEASED}
    assert versions >= set(range(1, file_format.FORMAT_VERSION + 1))


@pytest.mark.parametrize("path", RELEASED, ids=lambda p: p.stem)
def test_it_opens_and_its_rows_have_the_hashes_that_were_written(path):
    acts = theloom.open(path)
    wrong, nonfinite = inspect.check_hashes(acts)
    assert wrong == []
    assert not nonfinite.any()


def test_format_1_has_the_rows_that_it_had():
    acts = theloom.open(RELEASED[0])
    assert (len(acts), acts.precision, acts.hooks) == (290, "bf16", ["blocks.1.hook_resid_post"])
    assert acts.documents == ["pydoc_data.topics/assert", "pydoc_data.topics/assignment"]
    assert acts.window_offset.tolist() == [0, 100, 200, 260, 290]
    rows = acts["blocks.1.hook_resid_post"]
    assert rows[:2][:, :3].tolist() == [
        [0.609375, 1.03125, -0.625],
        [-0.357421875, -0.90625, -1.3046875],
    ]
    assert xxhash.xxh3_64_hexdigest(rows.numpy(...).tobytes()) == "d2dae97e6ba4f769"


def test_the_page_on_the_format_is_enough_for_a_reader_without_theloom():
    with h5py.File(RELEASED[0]) as file:
        dataset = file["hooks/blocks.1.hook_resid_post/activations"]
        offset, shape = dataset.id.get_offset(), dataset.shape
        hashes, windows = file["windows/hash"][:, 0], file["windows/offset"][:]
        assert file.attrs["kind"] == "physical"
    data = RELEASED[0].read_bytes()[offset : offset + 2 * shape[0] * shape[1]]
    values = (
        torch.frombuffer(bytearray(data), dtype=torch.uint16).to(torch.int32) << 16
    )  # the upper half of an FP32
    expected = theloom.open(RELEASED[0])["blocks.1.hook_resid_post"][:].float()
    assert torch.equal(values.view(torch.float32).view(shape), expected)
    for n, (begin, end) in enumerate(itertools.pairwise(windows)):
        assert (
            xxhash.xxh3_64_intdigest(data[2 * shape[1] * begin : 2 * shape[1] * end]) == hashes[n]
        )


def test_an_unknown_version_is_rejected(tmp_path):
    path = tmp_path / "new.h5"
    path.write_bytes(RELEASED[0].read_bytes())
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = file_format.FORMAT_VERSION + 1
    with pytest.raises(StoreError, match=r"version .* found .* version"):
        theloom.open(path)
