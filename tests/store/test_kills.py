"""kill -9 at random moments of a real extraction, again and again: KILLS=500 (`make test-store`);
by default a few.
"""

import os
import random
import shutil
import time

import h5py
import numpy as np
import pytest
import theloom
from support import extract_with_small_commits, forked, stages
from theloom.store.commit_log import committed
from theloom.store.partial import partial_of

KILLS = int(os.environ.get("KILLS", "6"))
REQUESTED = "corpus.max_tokens=6000 extraction.shards=1"


@pytest.fixture(scope="module", params=["auto", "fp8_e4m3"])
def whole(request, tmp_path_factory, tiny_llama):
    """A run that is ready to be extracted, and how many jobs of it are killed."""
    requested = f"{REQUESTED} store.dtype={request.param}"
    run = stages(tmp_path_factory.mktemp("whole"), tiny_llama, requested)
    run.prepare()
    return run, KILLS if request.param == "auto" else max(1, KILLS // 2)


def batches(partial) -> int:
    """Batches that the log of an unfinished file vouches for; 0 while there is none."""
    try:
        with h5py.File(partial) as file:
            return committed(file["commit_log"][:])
    except OSError:
        return 0


def stored(path) -> dict[str, np.ndarray]:
    """All rows as they are stored, by dataset: also the codes and the scales of encoded ones."""
    with h5py.File(path) as file:
        return {
            f"hooks/{hook}/{n}": d[:] for hook, g in file["hooks"].items() for n, d in g.items()
        }


def check(partial, truth) -> int:
    """The file can be read, and every row that its log vouches for is right; gives the batches."""
    with h5py.File(partial) as file:
        done = committed(file["commit_log"][:])
        batch_of, offsets = file["windows/batch"][:], file["windows/offset"][:]
        for window in np.flatnonzero(((batch_of > 0) & (batch_of <= done)).all(axis=1)):
            rows = slice(*(int(r) for r in offsets[window : window + 2]))
            for name, expected in truth.items():
                assert file[name][rows].tobytes() == expected[rows].tobytes()
    return done


def test_an_extraction_that_is_killed_repeatedly_loses_no_committed_row(whole, tmp_path):
    whole, most = whole
    forked(extract_with_small_commits, whole.folder).join()  # starts the server, too
    (shard,) = whole.shards
    shard.unlink()
    begun = time.monotonic()
    forked(extract_with_small_commits, whole.folder).join()
    seconds = time.monotonic() - begun
    acts = theloom.open(shard)
    truth = stored(shard)
    assert acts.stored_as == "fp32" or len(truth) == 2 * len(acts.hooks)
    choose, kills, went_on, finished = random.Random(0), 0, 0, 0
    while kills < most:
        folder = tmp_path / "run"
        shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("shards"))
        (folder / "shards").mkdir()
        target = folder / "shards" / shard.name
        before = 0
        while not target.exists():
            running = forked(extract_with_small_commits, folder)
            if (
                kills < most and kills % 2
            ):  # soon after it has committed something new; else at any moment
                while running.is_alive() and batches(partial_of(target)) <= before:
                    time.sleep(0.01)
                running.join(choose.uniform(0, 0.1))
            elif kills < most:
                running.join(choose.uniform(0, seconds))
            else:
                running.join()
            if running.is_alive():
                kills += 1
                running.kill()
            running.join()
            if partial_of(target).exists():
                after = check(partial_of(target), truth)
                assert after >= before  # nothing that was committed is lost
                went_on += after > before > 0
                before = after
        finished += 1
        found = theloom.open(target)
        again = stored(target)
        assert {n: rows.tobytes() for n, rows in again.items()} == {
            n: rows.tobytes() for n, rows in truth.items()
        }
        assert np.array_equal(found.window_hash, acts.window_hash)
        assert all(
            np.array_equal(found.statistics[h].mean, acts.statistics[h].mean) for h in acts.hooks
        )
        shutil.rmtree(folder)
    print(
        f"{kills} kills, {finished} shards finished, {went_on} jobs resumed after committed batches"
    )
    assert finished
