"""Whole runs block by block: the data of resident runs, kills included, and what is said where nothing fits."""

import h5py
import pytest
import theloom
from support import stages
from theloom import host
from theloom.errors import MemoryPlanError, ModelError
from theloom.host import DeviceMemory

SMALL = "corpus.max_tokens=3000 corpus.context_length=200 extraction.shards=2"


def data_of(run):
    acts = theloom.open(run.activations)
    return {hook: acts[hook].numpy(...).tobytes() for hook in acts.hooks} | {"hash": acts.window_hash.tobytes()}


@pytest.fixture(scope="module")
def resident(tmp_path_factory, tiny_llama):
    asked = f"{SMALL} extraction.execution=resident"
    return stages(tmp_path_factory.mktemp("resident"), tiny_llama, asked).all()


@pytest.fixture(scope="module")
def blockwise(tmp_path_factory, tiny_llama):
    asked = f"{SMALL} extraction.execution=layerwise"
    return stages(tmp_path_factory.mktemp("layerwise"), tiny_llama, asked).all()


def test_the_finished_data_are_those_of_a_resident_run(resident, blockwise):
    assert data_of(blockwise) == data_of(resident)
    for run, execution in ((blockwise, "layerwise"), (resident, "resident")):
        assert execution in theloom.open(run.activations).attributes["execution"]


def test_a_layerwise_run_is_verified(blockwise):
    blockwise.verify()


def test_figures_of_the_sweep_are_stored_and_nothing_else_is_left(blockwise):
    for file in blockwise.shards:
        with h5py.File(file) as opened:
            names = opened["figures"].attrs["names"].tolist()
            figures = dict(zip(names, opened["figures"][:].tolist(), strict=True))
        assert figures["blocks"] == 3
        assert figures["tokens"] >= 260
        assert 0 < figures["waited"] < figures["seconds"]
        assert figures["bytes_read"] > 10**5
    assert {f.suffix for f in (blockwise.folder / "shards").iterdir()} == {".h5"}


def test_auto_is_resident_where_it_fits_and_block_by_block_where_not(tmp_path, tiny_llama, monkeypatch, caplog):
    run = stages(tmp_path / "fits", tiny_llama, SMALL)
    run.prepare()
    with h5py.File(run.folder / "model.h5") as file:
        assert file.attrs["execution"] == "resident"
    monkeypatch.setattr(host, "memory", lambda: DeviceMemory(12_000_000, 12_000_000, "a small cgroup"))
    run = stages(tmp_path / "too-large", tiny_llama, f"{SMALL} memory.memory_warning_threshold=1")
    with pytest.raises(MemoryPlanError, match=r"a small cgroup.*and block by block the run needs at least"):
        run.prepare()
    monkeypatch.setattr(host, "memory", lambda: DeviceMemory(12_900_000, 12_900_000, "a small cgroup"))
    run.all()
    assert "it goes block by block" in caplog.text
    run.verify()
    run = stages(tmp_path / "resident", tiny_llama, f"{SMALL} extraction.execution=resident")
    with pytest.raises(MemoryPlanError, match=r"cpu has 12\.9 MB of 12\.9 MB free, limited by a small cgroup"):
        run.prepare()


def test_quantised_weights_are_refused_block_by_block(tmp_path, tiny_llama):
    run = stages(tmp_path, tiny_llama, f"{SMALL} extraction.execution=layerwise memory.quantization=8bit")
    with pytest.raises(ModelError, match=r"memory\.quantization=8bit is for models that stay on the device"):
        run.prepare()
