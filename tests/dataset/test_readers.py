"""Other people's programs read the files: plain h5py, netCDF4 and h5dump."""

import re
import subprocess

import h5py
import numpy as np
import pytest
import theloom
from slurm import install_packages
from support import stages

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def run(request, tmp_path_factory, tiny_llama):
    requested = f"extraction.shards=2 corpus.max_tokens=300 store.dtype={request.param}"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, requested).all()


@pytest.fixture(params=["shard", "virtual", "physical"])
def file(request, run, tmp_path):
    from theloom.dataset.merge import merge_shards

    if request.param == "physical":
        merge_shards(run.shards, "physical", tmp_path / "activations.h5")
        return tmp_path / "activations.h5"
    return run.shards[0] if request.param == "shard" else run.activations


def expected(file) -> np.ndarray:
    return theloom.open(file)[HOOK][:].float().numpy()


def test_plain_h5py(file):
    with h5py.File(file) as f:
        assert np.array_equal(f[f"hooks/{HOOK}/activations"][:].astype("f4"), expected(file))
        assert np.array_equal(f["tokens/input_ids"][:], theloom.open(file).input_ids.numpy(...))


def test_netcdf4(file):
    import netCDF4

    if theloom.open(file).precision == "fp16" or theloom.open(file).is_virtual:
        pytest.skip("netCDF has no half precision, and knows no virtual datasets")
    with netCDF4.Dataset(file) as f:
        assert np.array_equal(f["tokens/input_ids"][:], theloom.open(file).input_ids.numpy(...))
        stored = f["hooks"][HOOK]["activations"]
        assert np.array_equal(np.asarray(stored[:], "f4"), expected(file))


def test_h5dump(file):
    if missing := install_packages(["h5dump"], ["hdf5-tools"]):
        pytest.skip(missing)
    command = [
        "h5dump",
        "-y",
        "-w",
        "0",
        "-m",
        "%.9g",
        "-d",
        f"/hooks/{HOOK}/activations",
        "-s",
        "5,0",
        "-c",
        "2,64",
        file,
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    data = text.partition("DATA {")[2].partition("}")[0]
    found = np.array(re.findall(r"[-\d.e+]+", data), "f4").reshape(2, 64)
    np.testing.assert_allclose(found, expected(file)[5:7], rtol=1e-6)
