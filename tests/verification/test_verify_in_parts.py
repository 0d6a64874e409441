"""A verification in parts leaves the file that one job leaves, and refuses what one job refuses."""

import shutil

import h5py
import numpy as np
import pytest
from model_folders import llama
from model_folders import run as small_run
from support import Stages
from theloom import precision
from theloom.errors import StoreError, VerificationError
from theloom.verification import comparison, in_parts

TEXTS = [f"{n} " + "the lazy dog jumps. " * n for n in (1, 9, 2, 4, 3, 1, 2)]
POINTS = "memory.activation_cache_filter=[blocks.*.hook_resid_post]"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


def finished(folder, model, requested=""):
    overrides = f"{POINTS} extraction.shards=3 verify.documents=5 {requested}"
    return small_run(folder, model, overrides, TEXTS).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    return finished(tmp_path_factory.mktemp("run"), model)


def parts(run, folder, rows, documents):
    """The files of all parts."""
    counts = [folder / f"rows{n}.h5" for n in range(rows)]
    errors = [folder / f"documents{n}.h5" for n in range(documents)]
    for n, file in enumerate(counts):
        in_parts.check_rows(run.activations, n, rows, file, threads=2)
    for n, file in enumerate(errors):
        inputs = (run.config("verify"), run.activations, run.folder / "model.h5")
        in_parts.recompute_documents(*inputs, n, documents, file)
    return counts, errors


def gathered(run, folder, rows, documents):
    output = folder / "gathered.h5"
    files = parts(run, folder, rows, documents)
    in_parts.gather(run.activations, run.folder / "model.h5", *files, output)
    return output


def content(file):
    """Everything in a file: attributes, and datasets with their types."""
    found = {}
    with h5py.File(file) as opened:
        found |= {f"@{name}": str(value) for name, value in opened.attrs.items()}
        opened.visititems(
            lambda name, item: found.update(
                {name: (str(item.dtype), item.shape, item[()].tobytes())}
                if isinstance(item, h5py.Dataset)
                else {}
            )
        )
    return found


@pytest.mark.parametrize(("rows", "documents"), [(1, 1), (2, 3), (3, 7)])  # 7: two have nothing
def test_the_gathered_file_is_that_of_one_job(made, tmp_path, rows, documents):
    made.verify()
    whole = content(made.folder / "verification.h5")
    assert content(gathered(made, tmp_path, rows, documents)) == whole
    assert len(np.frombuffer(whole["recomputed/window"][2], "<i8")) == 5


@pytest.mark.parametrize(
    "requested",
    [
        "rows.pool=mean corpus.context_length=40",
        "store.compression=zstd store.merge=physical rows.keep=last",
        "memory.quantization=8bit",
    ],
)
def test_of_pooled_packed_and_quantised_runs_too(model, tmp_path, requested):
    run = finished(tmp_path, model, requested)
    run.verify()
    whole = content(run.folder / "verification.h5")
    assert ("fp32/cosine" in whole) == ("8bit" in requested)
    assert content(gathered(run, tmp_path, 2, 2)) == whole


@pytest.mark.parametrize("most", [1 << 30, 3000])  # 3,000 bytes: more than any one part has
def test_rounding_is_judged_over_all_parts(made, tmp_path, monkeypatch, caplog, most):
    monkeypatch.setitem(precision.TOLERANCE, "fp32", 1e-12)
    monkeypatch.setattr(comparison, "MAX_SUSPECT_BYTES", most)
    outcomes = []
    for verify in (made.verify, lambda: gathered(made, tmp_path, 1, 5)):
        try:
            verify()
            outcomes.append("verified")
        except VerificationError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0] == "verified") == (most > 3000)
    assert ("of values differ: not compared to FP64" in caplog.text) == (most == 3000)
    assert content(tmp_path / "gathered.h5") == content(made.folder / "verification.h5")


def test_a_changed_bit_ends_the_job_of_its_shards_and_no_other(made, tmp_path):
    run = Stages(shutil.copytree(made.folder, tmp_path / "run"))
    raw = bytearray(run.shards[2].read_bytes())
    with h5py.File(run.shards[2]) as file:
        raw[file["hooks/blocks.1.hook_resid_post/activations"].id.get_offset() + 9] ^= 1
    run.shards[2].write_bytes(raw)
    for part in (0, 1):
        in_parts.check_rows(run.activations, part, 3, tmp_path / f"{part}.h5")
    with pytest.raises(VerificationError, match="rows of 1 windows are not those"):
        in_parts.check_rows(run.activations, 2, 3, tmp_path / "2.h5")
    assert not (tmp_path / "2.h5").exists()


def test_changed_tables_end_the_job_of_their_file(made, tmp_path):
    run = Stages(shutil.copytree(made.folder, tmp_path / "run"))
    with h5py.File(run.shards[1], "a") as file:
        file["statistics/nonfinite"][0] += 1
    in_parts.check_rows(run.activations, 0, 3, tmp_path / "0.h5")
    with pytest.raises(VerificationError, match=r"00001-of-00003\.h5: its log, hashes or stat"):
        in_parts.check_rows(run.activations, 1, 3, tmp_path / "1.h5")


def test_parts_that_are_not_all_of_these_rows_are_refused(made, model, tmp_path):
    rows, documents = parts(made, tmp_path, 2, 2)
    output, record = tmp_path / "gathered.h5", made.folder / "model.h5"
    for some in ([rows[0]], [rows[0], rows[0]]):
        with pytest.raises(StoreError, match=r"not the \d parts of a verification of"):
            in_parts.gather(made.activations, record, some, documents, output)
    with h5py.File(documents[1], "a") as file:
        file.attrs["run_fingerprint"] = "another"
    with pytest.raises(StoreError, match="remove that folder and run again"):
        in_parts.gather(made.activations, record, rows, documents, output)
    assert not output.exists()
