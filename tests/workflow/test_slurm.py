"""The pipeline on a real Slurm: GPUs, memory, cancelled jobs, and what a controller or Snakemake
itself can suffer.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import preloading
import pytest
import slurm as slurm_here
import theloom
from filelock import FileLock
from slurm import Slurm, wait_for
from support import Project, copy_project, plain_residuals, stages
from theloom.config import compose
from theloom.config.frozen import STAGES, freeze, load_frozen
from theloom.corpus import tokens
from theloom.pipeline import extract_shard, load_model, stage_model
from theloom.planning import estimate
from theloom.store import commit_log

RUN = "run"
SHARDS = 2
TWO_SHARDS = (
    f"name={RUN} extraction.shards={SHARDS} extraction.batch_tokens=64 resources.mem_mb=1500 "
    "resources.threads=1"
)
QUICK = [
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--max-status-checks-per-second",
    "2",
    "--latency-wait",
    "5",
]
# what comes before the shards is there, and what comes after is as everywhere
EXTRACTED = [f"results/{RUN}/shards/{number:05d}-of-{SHARDS:05d}.h5" for number in range(SHARDS)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with FileLock("/tmp/theloom-tests-slurm.lock"):  # /etc/slurm is the machine's
        folder = tmp_path_factory.mktemp("slurm")
        try:
            slurm_here.install()
            running = slurm_here.start(folder)
        except slurm_here.SlurmUnavailableError as error:
            pytest.skip(f"no Slurm here: {error}")
        yield running
        slurm_here.stop(running)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_profile) -> Project:
    """A run up to its model record, made without Snakemake: what Slurm's jobs then take up."""
    project = copy_project(tmp_path_factory.mktemp("prepared"))
    tiny_profile(project)
    folder, frozen = prepare(project, TWO_SHARDS)
    load_model.record(
        frozen("model"), folder / "estimate.h5", folder / "tokens.h5", folder / "model.h5"
    )
    return project


def prepare(project: Project, overrides: str) -> tuple[Path, Callable[[str], Any]]:
    """A run up to its tokens and estimate: its folder, and its frozen config by stage."""
    folder = project.results(RUN)
    for name in ("config", "shards"):
        (folder / name).mkdir(parents=True)
    (run,) = compose.runs(project.folder / "config", "tiny", overrides).values()
    for stage in STAGES:
        freeze(run.stage(stage), folder / f"config/{stage}.json")

    def frozen(stage: str) -> Any:
        return load_frozen(folder / f"config/{stage}.json")

    stage_model.stage(frozen("source"), folder / "source.json")
    tokens.tokenize(frozen("tokens"), folder / "tokens.h5")
    estimate.run_estimate(frozen("estimate"), folder / "estimate.h5")
    return folder, frozen


@pytest.fixture(scope="module")
def local(
    prepared: Project, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, np.ndarray]]:
    """The rows of the same shards without Slurm and without Snakemake."""
    project = copy_of(prepared, tmp_path_factory.mktemp("local") / "project")
    folder = project.results(RUN)
    inputs = [
        folder / name for name in ("config/extract.json", "estimate.h5", "model.h5", "tokens.h5")
    ]
    for number, shard in enumerate(EXTRACTED):
        extract_shard.extract_shard(*inputs, number, project.folder / shard)
    return rows_of(project)


@pytest.fixture
def tiny(prepared: Project, tmp_path: Path) -> Project:
    return copy_of(prepared, tmp_path / "project")


def copy_of(project: Project, folder: Path) -> Project:
    shutil.copytree(project.folder, folder, symlinks=True)
    return Project(folder)


def start(
    project: Project,
    *options: str,
    overrides: str = "",
    profile: str = "tiny",
    preloaded: bool = True,
    forked: bool = True,
) -> subprocess.Popen:
    """Without `preloaded`, jobs are Slurm's own processes, whose memory it counts and which it
    kills: else the tests' server forks them beside its steps, and they start at once. Without
    `forked`, Snakemake itself is the process that is returned, for a signal.
    """
    alone = ["-c", "import sys; from snakemake.cli import main; main(sys.argv[1:])"]
    words = ["-m", "snakemake"] if forked else alone
    words += [*options, "--profile", "workflow/profiles/slurm", *QUICK]
    words += ["--config", f"profiles={profile}", *([f"set={overrides}"] if overrides else [])]
    with (project.folder / "printed.txt").open("a") as printed:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=project.folder,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
            env=preloading.environment() if preloaded else None,
            # a test run in the background ignores Ctrl-C, and would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def finish(running: subprocess.Popen, project: Project, timeout: float = 1800) -> str:
    try:
        running.wait(timeout)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return (project.folder / "printed.txt").read_text()


def comment(record: dict[str, str]) -> str:
    """What the executor notes of a job: its rule and wildcards."""
    return record.get("Comment", "")


def shard_jobs(slurm: Slurm, since: set[str]) -> list[dict[str, str]]:
    return [
        r
        for r in slurm.records()
        if comment(r).startswith("rule_extract_shard") and r["JobId"] not in since
    ]


def known(slurm: Slurm) -> set[str]:
    return {record["JobId"] for record in slurm.records()}


def rows_of(project: Project) -> list[dict[str, np.ndarray]]:
    """The stored bits of all hook points, shard by shard."""
    rows = []
    for shard in sorted((project.results(RUN) / "shards").glob("*.h5")):
        with h5py.File(shard) as file:
            rows.append({hook: file[f"hooks/{hook}/activations"][:] for hook in file["hooks"]})
    assert len(rows) == SHARDS
    return rows


def assert_same_rows(project: Project, expected: list[dict[str, np.ndarray]]) -> None:
    for stored, rows in zip(rows_of(project), expected, strict=True):
        assert list(stored) == list(rows)
        assert all(np.array_equal(stored[hook], rows[hook]) for hook in rows)


def spy_on_gpus(project: Project) -> Path:
    """Have each extraction note the GPUs that Slurm gave it, and wait until all have theirs."""
    script = project.folder / "workflow/scripts/extract_shard.py"
    notes = project.folder / "notes"
    notes.mkdir()
    script.write_text(
        script.read_text().replace(
            "with job(",
            "import os, time\n"
            f"notes = Path({str(notes)!r})\n"
            "gpus = os.environ.get('CUDA_VISIBLE_DEVICES', '')\n"
            "(notes / snakemake.wildcards.shard).write_text(gpus)\n"
            "end = time.time() + 600\n"
            f"while len(list(notes.iterdir())) < {SHARDS} and time.time() < end:\n"
            "    time.sleep(0.1)\n"
            "with job(",
            1,
        )
    )
    return notes


def test_parallel_shards_have_a_gpu_each_and_the_rows_of_a_local_run(slurm, tiny, local):
    notes, before = spy_on_gpus(tiny), known(slurm)
    running = start(
        tiny, *EXTRACTED, overrides=f"{TWO_SHARDS} resources.gpu=1 resources.gpu_model=a100"
    )
    printed = finish(running, tiny)
    assert running.returncode == 0, printed
    jobs = shard_jobs(slurm, before)
    assert len(jobs) == SHARDS
    assert {job["TresPerJob"] for job in jobs} == {"gres:gpu:a100:1"}
    assert {job["JOB_GRES"] for job in jobs} == {"gpu:a100:1"}
    assert sorted(note.read_text() for note in notes.iterdir()) == ["0", "1"]
    assert_same_rows(tiny, local)


def test_a_job_killed_for_its_memory_is_retried_with_more_and_passes(slurm, tiny, local):
    before = known(slurm)
    little = TWO_SHARDS.replace("1500", "300")
    running = start(tiny, *EXTRACTED, overrides=little, preloaded=False)
    printed = finish(running, tiny)
    assert running.returncode == 0, printed
    attempts: dict[str, list[tuple[int, str]]] = {}
    for job in shard_jobs(slurm, before):
        requested = int(re.search(r"mem=(\d+)M", job["TRES"])[1])
        attempts.setdefault(comment(job), []).append((requested, job["JobState"]))
    assert len(attempts) == SHARDS
    for tries in attempts.values():
        assert [memory for memory, _ in tries] == [
            300 * number for number in range(1, len(tries) + 1)
        ]
        assert len(tries) > 1
        assert [state == "COMPLETED" for _, state in tries] == [False] * (len(tries) - 1) + [True]
    assert "exceeded memory limit" in (slurm.folder / "slurmd.log").read_text()
    assert_same_rows(tiny, local)


def after_each_batch(project: Project, code: str) -> None:
    """Have the extraction commit after every batch, and then run a line of code."""
    script = project.folder / "workflow/scripts/extract_shard.py"
    script.write_text(
        script.read_text().replace(
            "with job(",
            "import time\n"
            "from theloom.store import writer as shard_module\n"
            "shard_module.COMMIT_BYTES = 1\n"
            "done = shard_module.ShardWriter.batch_done\n"
            "def then(self, *arguments, **named):\n"
            "    done(self, *arguments, **named)\n"
            f"    {code}\n"
            "shard_module.ShardWriter.batch_done = then\n"
            "with job(",
            1,
        )
    )


def slow_shards(project: Project) -> None:
    """Have the extraction take its time over each batch."""
    after_each_batch(project, "time.sleep(1)")


def hold_shards(project: Project) -> Path:
    """Have the extraction wait after its first batch, until the file exists whose path is returned,
    or it is killed.

    So no shard is finished before, but for those without a document.
    """
    go = project.folder / "go"
    after_each_batch(project, f"while not Path({str(go)!r}).exists(): time.sleep(0.05)")
    return go


def committed(project: Project) -> int:
    """Batches that the unfinished shards of a run have committed."""
    total = 0
    for partial in (project.results(RUN) / "shards").glob("*.partial"):
        with (
            contextlib.suppress(FileNotFoundError),
            h5py.File(partial) as file,
        ):  # a job may just have finished it
            total += commit_log.committed(file["commit_log"][:])
    return total


def full(rows: list[dict[str, np.ndarray]]) -> int:
    """How many shards have a row."""
    return sum(any(map(len, shard.values())) for shard in rows)


def test_a_cancelled_shard_goes_on_from_its_last_committed_row(slurm, tiny, local):
    go, before = hold_shards(tiny), known(slurm)
    running = start(tiny, *EXTRACTED, "--retries", "0", overrides=TWO_SHARDS, preloaded=False)
    wait_for(lambda: running.poll() is not None or committed(tiny) == full(local), 900, tiny.folder)
    slurm.ask("scancel", *(job["JobId"] for job in shard_jobs(slurm, before)))
    printed = finish(running, tiny)
    assert running.returncode != 0, printed
    assert "CANCELLED" in printed
    assert committed(tiny) == full(local)
    go.touch()
    running = start(tiny, *EXTRACTED, overrides=TWO_SHARDS)
    printed = finish(running, tiny)
    assert running.returncode == 0, printed
    logs = [log.read_text() for log in (tiny.results(RUN) / "logs/extract_shard").glob("*.log")]
    taken_up = [int(n) for text in logs for n in re.findall(r"resuming \S+ after (\d+) of", text)]
    assert taken_up == [1] * full(local)
    assert_same_rows(tiny, local)


def test_ctrl_c_cancels_all_jobs(slurm, tiny, local):
    hold_shards(tiny)
    before = known(slurm)
    running = start(tiny, *EXTRACTED, overrides=TWO_SHARDS, preloaded=False)
    wait_for(lambda: running.poll() is not None or committed(tiny) == full(local), 900, tiny.folder)
    os.killpg(running.pid, signal.SIGINT)
    printed = finish(running, tiny, 60)
    assert running.returncode != 0, printed
    wait_for(lambda: not slurm.jobs(), 300, slurm.jobs())
    states = [job["JobState"] for job in shard_jobs(slurm, before)]
    assert states.count("CANCELLED") >= full(local)
    assert len(states) == SHARDS
    assert set(states) <= {"CANCELLED", "COMPLETED"}


def test_after_kill_9_of_snakemake_the_same_command_finishes(slurm, tiny, local):
    slow_shards(tiny)
    before = known(slurm)
    running = start(tiny, *EXTRACTED, overrides=TWO_SHARDS, forked=False)
    wait_for(
        lambda: running.poll() is not None or len(shard_jobs(slurm, before)) == SHARDS,
        900,
        tiny.folder,
    )
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    unlocked = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--unlock",
            "--config",
            "profiles=tiny",
            f"set={TWO_SHARDS}",
        ],
        cwd=tiny.folder,
        env=preloading.environment(),
        capture_output=True,
        text=True,
    )
    assert unlocked.returncode == 0, unlocked.stderr
    running = start(tiny, *EXTRACTED, overrides=TWO_SHARDS)
    printed = finish(running, tiny)
    assert running.returncode == 0, printed
    assert_same_rows(tiny, local)


def test_the_generic_profile_submits_through_sbatch(slurm, tiny, local):
    before = known(slurm)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *EXTRACTED,
        "--profile",
        "workflow/profiles/cluster-generic",
    ]
    command += ["--max-status-checks-per-second", "2", "--latency-wait", "5"]
    command += ["--config", "profiles=tiny", f"set={TWO_SHARDS} resources.gpu=1"]
    done = subprocess.run(
        command,
        cwd=tiny.folder,
        env=preloading.environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [r for r in slurm.records() if r["JobId"] not in before]
    shards = [r for r in jobs if r["JobName"] == "theloom-extract_shard"]
    assert [r["TresPerJob"] for r in shards] == ["gres:gpu:1"] * SHARDS
    assert {r["JobState"] for r in jobs} == {"COMPLETED"}
    assert_same_rows(tiny, local)


def kill_after_two_answers(project: Project, shards: int) -> None:
    """Have the first jobs of so many shards end by SIGKILL after two answers each."""
    script = project.folder / "workflow/scripts/sample_answers.py"
    script.write_text(
        script.read_text().replace(
            "with job(",
            "import os, signal\n"
            "from theloom.answers.answer import PartialAnswers\n"
            "add = PartialAnswers.add\n"
            "def then(self, answer):\n"
            "    add(self, answer)\n"
            "    killed = Path('killed-' + snakemake.wildcards.shard)\n"
            "    later = len(self.found) < 2 or killed.exists()\n"
            f"    if not later and int(snakemake.wildcards.shard) < {shards}:\n"
            "        killed.touch()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "PartialAnswers.add = then\n"
            "with job(",
            1,
        )
    )


def test_answers_of_four_shards_and_three_kills_are_those_of_a_local_run(
    slurm, tmp_path, tiny_profile, tiny_llama
):
    (tmp_path / "project").mkdir()
    project = copy_project(tmp_path / "project")
    tiny_profile(project)
    rows = [{"text": f"The answer to question {n} is"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = (
        f"corpus=text corpus.path={tmp_path}/rows.jsonl answers.source=model answers.samples=2 "
        "answers.max_new_tokens=8 answers.temperature=1"
    )
    local = stages(tmp_path / "local", tiny_llama, f"{asked} extraction.shards=1 answers.batch=16")
    estimate.run_estimate(local.config("estimate"), local.folder / "estimate.h5")
    tokens.tokenize(local.config("tokens"), local.folder / "tokens.h5")
    local.answer()
    overrides = f"name={RUN} {asked} extraction.shards=4 answers.batch=2 "
    overrides += "resources.mem_mb=1500 resources.threads=1"
    folder, _ = prepare(project, overrides)
    kill_after_two_answers(project, 3)
    running = start(project, f"results/{RUN}/answers.h5", overrides=overrides)
    printed = finish(running, project, 300)
    assert running.returncode == 0, printed
    assert len([*project.folder.glob("killed-*")]) == 3
    resumed = 0
    for shard in sorted((folder / "answers").glob("*.h5")):
        with h5py.File(shard) as file:
            resumed += bool(file.attrs["tokens_sampled"] < len(file["input_id"]))
    assert resumed == 3
    with h5py.File(folder / "answers.h5") as found, h5py.File(local.documents) as expected:
        for name in ("tokens/input_ids", "documents/id", "answers/seed", "answers/stop_reason"):
            assert np.array_equal(found[name][:], expected[name][:]), name


def slow_starts(project: Project) -> None:
    """Have a job's own Snakemake take seconds before it calls srun, as on a busy machine."""
    rules = project.folder / "workflow/rules/common.smk"
    late = "slurm.wait_before_steps()\n    import os\n"
    late += "    time.sleep(0 if 'SLURM_STEP_ID' in os.environ else 6)\n"
    text = rules.read_text()
    assert "slurm.wait_before_steps()\n" in text
    rules.write_text(text.replace("slurm.wait_before_steps()\n", late))


def test_a_controller_that_is_away_for_half_a_minute_loses_no_run(slurm, tiny, local):
    slow_shards(tiny)
    slow_starts(tiny)  # so that each srun comes while the controller is away
    before = known(slurm)
    running = start(tiny, *EXTRACTED, overrides=TWO_SHARDS)
    wait_for(
        lambda: running.poll() is not None or len(shard_jobs(slurm, before)) == SHARDS,
        900,
        tiny.folder,
    )
    slurm.stop("slurmctld")
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(30)
    slurm.start("slurmctld")
    slurm.wait_until_ready(300)
    printed = finish(running, tiny)
    assert running.returncode == 0, printed
    assert {job["JobState"] for job in shard_jobs(slurm, before)} == {"COMPLETED"}
    assert_same_rows(tiny, local)


def test_the_real_model_in_two_shards_has_the_rows_of_plain_transformers(slurm, project, smollm2):
    running = start(
        project,
        overrides="name=real corpus.max_tokens=640 extraction.shards=2 resources.gpu=1 "
        "verify.documents=1",
        profile="smollm2-135m",
    )
    printed = finish(running, project, 900)
    assert running.returncode == 0, printed
    assert "640 tokens of 2 documents in fp32" in printed
    acts = theloom.open(project.results("real") / "activations.h5")
    document = acts.document(1)
    expected = plain_residuals(smollm2.folder, document.input_ids.tolist())
    for hook in acts.hooks:
        error = float((document[hook] - expected[hook]).abs().max() / expected[hook].abs().max())
        assert error <= 1e-5, (hook, error)


def test_a_failed_run_leaves_others_alone_and_is_named_at_the_end(slurm, tiny):
    texts = tiny.folder / "texts"
    texts.mkdir()
    (texts / "bad.txt").write_bytes(b"\xff\xff")
    (texts / "good.txt").write_text("some good text " * 20)
    running = start(
        tiny,
        "--retries",
        "1",
        overrides=f"corpus=text corpus.path={texts}/bad.txt,{texts}/good.txt "
        "resources.mem_mb=1500 resources.threads=1",
    )
    printed = finish(running, tiny, 600)
    assert running.returncode != 0
    finished = list((tiny.folder / "results").glob("*/verification.h5"))
    assert [theloom.open(f.parent / "activations.h5").precision for f in finished] == ["fp32"]
    assert "bad.txt, line 1: not utf-8" in printed
    (rejected,) = (tiny.folder / "results").rglob("*.rejected")
    retried = rejected.with_suffix("").read_text()  # which did not look at the text again
    assert retried.startswith("error: bad.txt, line 1")
    assert retried.count("\n") == 1
    named = {
        line
        for line in printed.splitlines()
        if line.startswith("error: bad.txt, line 1") and "(log: " in line
    }
    assert len(named) == 1
