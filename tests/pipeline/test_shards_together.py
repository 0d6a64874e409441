"""Several shards in one job: rows as of single jobs, and what an error leaves of finished ones."""

import logging

import h5py
import pytest
from support import build_tiny, stages, with_bytes
from theloom.errors import StoreError
from theloom.pipeline.extract_shard import extract_shards
from theloom.store.lock import WriterLock
from theloom.store.partial import finished_of

CUT = "extraction.shards=3 corpus.max_tokens=900"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_bytes(build_tiny("gpt2", tmp_path_factory.mktemp("model"), vocab_size=260))


def rows_of(shard) -> dict[str, bytes]:
    """The rows of a shard, and their hashes and statistics."""
    found = {}

    def keep(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset) and name.startswith(
            ("hooks/", "statistics/", "windows/")
        ):
            found[name] = node[()].tobytes()

    with h5py.File(shard) as file:
        file.visititems(keep)
    assert any(name.startswith("hooks/") for name in found)
    return found


def together(run, *numbers) -> None:
    files = [run.folder / name for name in ("extract.json", "estimate.h5", "model.h5", "tokens.h5")]
    extract_shards(*files, {n: run.folder / f"shards/{n:05d}-of-00003.h5" for n in numbers})


@pytest.mark.parametrize("execution", ["resident", "layerwise"])
def test_shards_of_one_job_are_those_of_single_jobs(tmp_path, model, caplog, execution):
    run = stages(tmp_path, model, f"{CUT} extraction.execution={execution}")
    run.prepare()
    run.extract()
    expected = {shard: rows_of(shard) for shard in run.shards}
    assert len(expected) == 3
    for shard in expected:
        shard.unlink()
    held, second = WriterLock(run.folder / "shards/00001-of-00003.h5"), list(expected)[1]
    held.take()
    with pytest.raises(StoreError, match="another job writes it"):
        together(run, 0, 1, 2)
    held.release()
    assert run.shards == []  # no final name before all are finished
    (first,) = run.folder.glob("shards/*.finished")
    inode = first.stat().st_ino
    finished_of(second).write_bytes(b"no file of ours")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        together(run, 0, 1, 2)
    assert [r.getMessage() for r in caplog.records if "finished by" in r.getMessage()] == [
        "00000-of-00003.h5: finished by an earlier job, and kept"
    ]
    assert caplog.text.count("model loaded in") == (execution == "resident")
    assert run.shards[0].stat().st_ino == inode
    assert {shard: rows_of(shard) for shard in run.shards} == expected
    assert not list(run.folder.glob("shards/*.finished")) + list(run.folder.glob("shards/*.lock"))
