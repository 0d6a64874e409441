"""Snakemake extracts several shards in one job: the same rows as one shard a job, and after a kill
none is computed twice.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import h5py
import preloading
import pytest
from support import copy_project
from theloom.planning import shard_groups
from theloom.store.partial import finished_of, partial_of

CUT = "extraction.shards=5 verify.documents=1 corpus.max_tokens=2500"
GROUPED = f"name=grouped {CUT} resources.shards_per_job=3"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_profile):
    project = copy_project(tmp_path_factory.mktemp("grouped"))
    tiny_profile(project)
    return project


def rows_of(shard) -> dict[str, bytes]:
    """Every dataset of a shard but for those of time and memory."""
    found = {}
    with h5py.File(shard) as file:
        file.visititems(
            lambda name, node: (
                found.__setitem__(name, node[()].tobytes())
                if isinstance(node, h5py.Dataset) and name.startswith(("hooks/", "windows/hash"))
                else None
            )
        )
    assert found
    return found


@contextmanager
def held_in_the_third_shard(project, first) -> Iterator[None]:
    """Have the extraction wait after each batch once the first shard is finished."""
    script = project.folder / "workflow/scripts/extract_shard.py"
    original = script.read_text()
    script.write_text(
        original.replace(
            "with job(",
            "import time\n"
            "from theloom.store import writer\n"
            "done = writer.ShardWriter.batch_done\n"
            "def then(self, *arguments, **named):\n"
            "    done(self, *arguments, **named)\n"
            f"    while Path({str(first)!r}).exists(): time.sleep(0.05)\n"
            "writer.ShardWriter.batch_done = then\n"
            "with job(",
            1,
        )
    )
    yield
    script.write_text(original)


def kill_in_the_third_shard(project) -> None:
    """kill -9 of Snakemake and its jobs, once a job has finished its first two shards; the second
    has no document, and so no batch at which it could be held.
    """
    _, _, *words = project.command(profiles="tiny", overrides=GROUPED)
    alone = "import sys; from snakemake.cli import main; main(sys.argv[1:])"
    running = subprocess.Popen(  # a process of this group, as are those that hand over its jobs
        [sys.executable, "-c", alone, *words[1:]],
        cwd=project.folder,
        env=preloading.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    shards = project.results("grouped") / "shards"
    while running.poll() is None and not (
        (shards / "00000-of-00005.h5.finished").exists()
        and partial_of(shards / "00002-of-00005.h5").exists()
    ):
        time.sleep(0.001)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def test_a_killed_group_goes_on_and_gives_the_rows_of_single_jobs(tiny):
    counted = tiny.jobs(profiles="tiny", overrides=GROUPED)
    extracting = {name: n for name, n in counted.items() if name.startswith("extract_shard")}
    assert extracting == {"extract_shards_0_to_2_of_5": 1, "extract_shards_3_to_4_of_5": 1}
    done = tiny.snakemake("--until", "load_model", profiles="tiny", overrides=GROUPED)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = tiny.results("grouped") / "shards"
    first = finished_of(shards / "00000-of-00005.h5")
    with held_in_the_third_shard(tiny, first):
        kill_in_the_third_shard(tiny)
    before = first.stat().st_ino
    assert not list(shards.glob("0000[0-2]-of-00005.h5"))
    done = tiny.snakemake("--unlock", profiles="tiny", overrides=GROUPED)
    assert done.returncode == 0, done.stderr
    done = tiny.snakemake("--rerun-incomplete", profiles="tiny", overrides=f"name=grouped {CUT}")
    assert done.returncode == 0, done.stdout + done.stderr  # a started run keeps its number
    found = shards / "00000-of-00005.h5"
    assert found.stat().st_ino == before
    assert not list(shards.glob("*.finished")) + list(shards.glob("*.partial"))
    log = (shards.parent / "logs/extract_shard/00000-to-00002-of-00005.log").read_text()
    assert "00000-of-00005.h5: finished by an earlier job, and kept" in log
    assert log.count("model loaded in") == 1
    assert tiny.jobs(profiles="tiny", overrides=GROUPED) == {}

    done = tiny.snakemake(
        "--until", "extract_shard", profiles="tiny", overrides=f"name=alone {CUT}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = sorted((tiny.results("alone") / "shards").glob("*.h5"))
    assert len(alone) == 5
    for shard in alone:
        assert rows_of(shards / shard.name) == rows_of(shard)


def test_runs_that_are_cut_differently_share_a_call(tiny):
    swept = "extraction.shards=4 resources.shards_per_job=1,2,3"
    counted = tiny.jobs(profiles="tiny", overrides=swept)
    assert {name: n for name, n in counted.items() if name.startswith("extract_shard")} == {
        "extract_shard": 4,
        "extract_shards_0_to_1_of_4": 1,
        "extract_shards_2_to_3_of_4": 1,
        "extract_shards_0_to_2_of_4": 1,
        "extract_shards_3_to_3_of_4": 1,
    }


def test_a_job_on_a_cluster_builds_the_rule_it_was_sent_for():
    words = ["snakemake", "--target-jobs", "loom_extract_shards_4_to_7_of_9:run=a"]
    (group,) = shard_groups.of_words(words)
    assert group.names == [f"{n:05d}-of-00009" for n in range(4, 8)]
