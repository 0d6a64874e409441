"""HDF5 files on disks that fail while they are written."""

import errno
from pathlib import Path

import h5py
import numpy as np
import pytest
from theloom.store import compression
from theloom.store.hdf5 import element_types
from theloom.store.hdf5.output import written

ROWS = np.random.default_rng(0).integers(0, 1 << 16, (5000, 64)).astype("<u2")


def pack(path):
    """A packed dataset between two others."""
    with written(path) as file:
        file["before"] = np.arange(3)
        dataset = compression.create_packed(
            file, "rows", ROWS.shape, element_types.hdf5_type("bf16")
        )
        compression.write(dataset, lambda start, stop: ROWS[start:stop], file.check)
        file["after"] = np.arange(4)


def test_a_full_disk_is_one_error_with_its_path():
    """HDF5 itself crashes when it closes such a file."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        pack(Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_what_is_written_is_an_ordinary_file(tmp_path):
    pack(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["before"][:].tolist() == [0, 1, 2]
        assert file["after"][:].tolist() == [0, 1, 2, 3]
        chunks = file["rows"].id
        assert chunks.get_num_chunks() > 1
        size, stored = file["rows"].size * 2, chunks.get_storage_size()
    assert 0 < stored <= 1.1 * size


def test_an_error_of_the_caller_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), written(tmp_path / "a.h5") as file:
        file["x"] = 1 // 0
