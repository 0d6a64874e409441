"""Files of every version of the format that was ever released can be read.

`released/activations-format-1-bf16.h5` was written by 0.1.0: the last block of a tiny Llama over
290 tokens, merged physically. A new version of the format adds a file here, and removes none.
"""

import itertools
from pathlib import Path

import h5py
import pytest
import theloom
import torch
import xxhash
from theloom.dataset import inspect
from theloom.errors import StoreError
from theloom.store import file_format

RELEASED = sorted((Path(__file__).parents[1] / "released").glob("activations-format-*.h5"))


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


def test_a_version_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "new.h5"
    path.write_bytes(RELEASED[0].read_bytes())
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = file_format.FORMAT_VERSION + 1
    with pytest.raises(StoreError, match=r"version .* found .* version"):
        theloom.open(path)
