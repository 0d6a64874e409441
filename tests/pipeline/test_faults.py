"""A disk that is full or fails, and signals, at every write of every stage: one line each, and the
rerun ends with the rows of an undisturbed run.

By default some writes of each stage; `THELOOM_FAULTS=0` takes every one, with the four faults in
turn, and 1, 2 and 3 the same from another fault on: all four of them take every fault at every
write.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import theloom
from faulted_jobs import disk
from model_folders import TEXTS, llama, run

FIRST = os.environ.get("THELOOM_FAULTS")
SHARD = "shards/00000-of-00001.h5"
PUSHED = "pushed/00000-of-00001.json"
PREPARED = {"estimate": "estimate.h5", "model": "model.h5", "tokens": "tokens.h5"}


def script(name, config, output, **inputs):
    job = {"script": name, "input": {"config": f"{config}.json", **inputs}, "output": output}
    return job | {"wildcards": {"run": "run", "shard": 0, "part": 0, "parts": 1}}


CHECKED, RECOMPUTED = (f"verification/{kind}.h5" for kind in ("rows", "documents"))
PART = "tokens/00000-of-00001.h5"
MERGED = {"activations": "activations.h5"}
DRAWN = {"first": "figures/first.svg"}  # a report's script takes the folder alone of its outputs
JOBS = {
    "freeze_config": script("freeze_config", "estimate", {"config": "frozen/estimate.json"}),
    "estimate_memory": script("estimate_memory", "estimate", {"estimate": "estimate.h5"}),
    "stage_model": script("stage_model", "source", {"source": "staged.json"}),
    "tokenize_corpus": script("tokenize_corpus", "tokens", {"tokens": "tokens.h5"}, parts=[]),
    "tokenize_part": script("tokenize_part", "tokens", {"tokens": PART}),
    "gather_tokens": script(
        "tokenize_corpus", "tokens", {"tokens": "gathered-tokens.h5"}, parts=[PART]
    ),
    "load_model": script(
        "load_model", "model", {"model": "model.h5"}, estimate="estimate.h5", tokens="tokens.h5"
    ),
    "extract_shard": script("extract_shard", "extract", {"shard": SHARD}, **PREPARED),
    "merge_shards": script("merge_shards", "merge", MERGED, shards=[SHARD]),
    "verify": script(
        "verify",
        "verify",
        {"verification": "verification.h5"},
        model="model.h5",
        rows=[],
        documents=[],
        **MERGED,
    ),
    "push_shard": script("push_shard", "push", {"record": PUSHED}, shard=SHARD),
    "push_run": script(
        "push_run",
        "push",
        {"record": "pushed.json"},
        shards=[SHARD],
        pushed=[],
        verification="verification.h5",
        **MERGED,
    ),
    "check_rows": script("check_rows", "verify", {"counts": CHECKED}, **MERGED),
    "recompute_documents": script(
        "recompute_documents", "verify", {"errors": RECOMPUTED}, model="model.h5", **MERGED
    ),
    "gather_verification": script(
        "verify",
        "verify",
        {"verification": "gathered.h5"},
        model="model.h5",
        rows=[CHECKED],
        documents=[RECOMPUTED],
        **MERGED,
    ),
    "report_memory": script(
        "report_memory", "report", DRAWN, estimate="estimate.h5", model="model.h5"
    ),
    "report_speed": script("report_speed", "report", DRAWN, shards=[SHARD]),
    "report_states": script("report_states", "report", DRAWN, shards=[SHARD], **MERGED),
    "report_attention": script("report_attention", "report", DRAWN, shards=[SHARD], **MERGED),
    "report_probe": script("report_probe", "report", DRAWN, **MERGED),
    "report_page": script("report_page", "report", {"page": "report.html"}, **MERGED),
    "remove_shards": script(
        "remove_shards", "remove", {"record": "removed.json"}, pushed="pushed.json", shards=[PUSHED]
    ),
}
SAMPLED = "answers/00000-of-00001.h5"
OF_ANSWERS = {
    "sample_answers": script(
        "sample_answers",
        "sample",
        {"answers": SAMPLED},
        estimate="estimate.h5",
        prompts="tokens.h5",
    ),
    "gather_answers": script(
        "gather_answers",
        "answers",
        {"answers": "answers.h5"},
        prompts="tokens.h5",
        answers=[SAMPLED],
    ),
    "report_answers": script(
        "report_answers", "report", DRAWN, answers="answers.h5", sampled=[SAMPLED]
    ),
}
BEFORE_ANSWERS = ("estimate_memory", "stage_model", "tokenize_corpus")

LABELLED = "corpus.columns=[text] report.label=text"
# Runs, and the jobs whose writes differ from those of the runs before.
RUNS = {
    "resident": (f"store.merge=virtual store.keep_local=false {LABELLED}", list(JOBS)),
    "layerwise": (
        f"extraction.execution=layerwise store.merge=physical {LABELLED}",
        ["extract_shard", "merge_shards"],
    ),
    "packed": (
        f"store.compression=zstd store.merge=physical {LABELLED}",
        ["extract_shard", "merge_shards"],
    ),
    "answers": ("answers.source=model answers.max_new_tokens=6", ["tokenize_corpus", *OF_ANSWERS]),
}
POINTS = "memory.activation_cache_filter=[blocks.0.hook_resid_post,blocks.1.hook_resid_post]"
FAULTS = {
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
}
# attributes of what a job did itself, of all that is in the file
OF_A_JOB = (
    "code_version",
    "seconds",
    "seconds_sampling",
    "tokens_sampled",
    "tokens_alone",
    "side_by_side",
)
MEASURED = ("memory", "metrics", "checksums", "sources/checksums")


def content(file):
    """All that a file holds, but for how long it took and which memory was free."""
    if file.suffix != ".h5":
        return re.sub(rb"<dc:date>.*?</dc:date>", b"", file.read_bytes())
    found = {}

    def look(name, part):
        if not name.startswith(MEASURED):
            found.update({f"{name}@{key}": str(value) for key, value in part.attrs.items()})
            for attribute in OF_A_JOB:
                found.pop(f"@{attribute}", None)
            if name.endswith("log_probability"):  # rounded as what was computed beside an answer
                found[name] = part.shape
            elif isinstance(part, h5py.Dataset) and part.compression != "unknown":
                found[name] = np.asarray(part[()]).tobytes()

    with h5py.File(file) as opened:
        look("", opened)
        opened.visititems(look)
    # packed rows are not read by HDF5 alone
    if file.name == "activations.h5" or file.parent.name == "shards":
        acts = theloom.open(file)
        found.update({hook: acts[hook].numpy(...).tobytes() for hook in acts.hooks})
    return found


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    with disk(tmp_path_factory.mktemp("disk")) as found:
        if found is None:
            pytest.skip("no C compiler here")
        yield found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory, failing, source):
    """An undisturbed run: its folder before each job, how many calls that job makes, and what is
    in the end.
    """
    overrides, tried = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    remote = f"store.remote=file://{tmp_path_factory.mktemp('remote')}"
    made = run(folder, source, f"{overrides} {remote} {POINTS} extraction.shards=1", TEXTS)
    JOBS["freeze_config"]["params"] = {
        "config": json.loads((made.folder / "estimate.json").read_text())
    }
    jobs = {n: j for n, j in JOBS.items() if n != "remove_shards" or n in tried}
    if request.param == "answers":
        jobs = {name: JOBS[name] for name in BEFORE_ANSWERS} | OF_ANSWERS
    before = {}
    for name, job in jobs.items():
        shutil.copytree(made.folder, folder / name)
        if name == "remove_shards":  # what is compared has the shards
            shutil.copytree(made.folder, folder / "finished")
        ended = failing.run(made.folder, job)
        assert ended.status == 0, ended.log + ended.console
        before[name] = (folder / name, files(made.folder) - files(folder / name), ended.calls)
    finished = made.folder
    if "remove_shards" in jobs:
        finished = folder / "finished"
        shutil.copy(made.folder / "removed.json", finished)
    return finished, {name: before[name] for name in tried}


def files(folder):
    """The files of a run, but for a log."""
    return {f.relative_to(folder) for f in folder.rglob("*") if f.is_file()} - {
        Path("logs/job.log")
    }


def choose(calls, name):
    """The calls that fail in a test: all, or the last and one or more at random: every fault at a
    shard's job, one of them at another's.
    """
    if FIRST is not None:
        return [(at, list(FAULTS)[(at + int(FIRST)) % 4]) for at in range(1, calls + 1)]
    chance = random.Random(name)
    faults = list(FAULTS) if name == "extract_shard" else [chance.choice(list(FAULTS))]
    return [(chance.randrange(1, calls + 1), fault) for fault in faults] + [(calls, "ENOSPC")]


def test_every_fault_is_one_line_and_the_rerun_is_right(whole, failing, tmp_path):
    finished, jobs = whole
    counts = dict.fromkeys(["one line", "killed", "no matter"], 0)
    for name, (before, outputs, calls) in jobs.items():
        job = {**JOBS, **OF_ANSWERS}[name]
        assert calls
        print(f"{name}: {calls} calls", flush=True)
        for at, fault in choose(calls, name):
            shown = f"{name}, call {at} of {calls}, {fault}"
            folder = shutil.copytree(before, tmp_path / "run")
            ended = failing.run(folder, job, at=at, answer=int(FAULTS[fault]))
            assert "Traceback" not in ended.log + ended.console, shown + ended.log + ended.console
            if ended.status == 0:  # the job could do without what it did not write
                counts["no matter"] += 1
            elif ended.status == -signal.SIGKILL:
                counts["killed"] += 1
            else:
                assert ended.status == 1, f"{shown}: {ended}"
                check_line(ended.log, fault, folder, shown)
                counts["one line"] += 1
            if ended.status:
                again = failing.run(folder, job)
                assert again.status == 0, f"{shown}: {again.log} {again.console}"
            assert files(folder) - files(before) == outputs, shown
            for output in outputs:
                found, right = content(folder / output), content(finished / output)
                assert found == right, f"{shown}: {output}"
            shutil.rmtree(folder)
    print(f"{sum(counts.values())} faults: {counts}")


def check_line(log, fault, folder, shown):
    """The log ends on one line, which says where, why and what to do."""
    line = log.splitlines()[-1]
    assert line.startswith("error: "), f"{shown}: {log}"
    assert log.count("error: ") == 1, f"{shown}: {log}"
    assert "again" in line, f"{shown}: {line}"
    if fault in ("ENOSPC", "EIO"):
        assert str(folder) in line, f"{shown}: {line}"
    if fault == "ENOSPC":
        assert re.search(r"[\d.]+ [GM]B are free", line), f"{shown}: {line}"
    if fault == "SIGTERM":
        assert "stopped by SIGTERM" in line, f"{shown}: {line}"


@pytest.fixture(scope="module")
def started(tmp_path_factory, failing, source):
    """A run whose next job is the extraction, without its shards."""
    made = run(tmp_path_factory.mktemp("started"), source, f"{POINTS} extraction.shards=1", TEXTS)
    for name in ("estimate_memory", "stage_model", "tokenize_corpus", "load_model"):
        assert failing.run(made.folder, JOBS[name]).status == 0
    return made.folder


def test_a_log_on_the_full_disk_leaves_its_line_on_the_console(started, failing, tmp_path):
    folder = shutil.copytree(started, tmp_path / "run")
    job = JOBS["merge_shards"]
    ended = failing.run(folder, job, at=1, answer=errno.ENOSPC, log=str(folder / "job.log"))
    assert ended.status == 1
    assert ended.console.startswith(f"error: {folder}/job.log: No space left on device (")
    assert "are free on" in ended.console
    assert "Traceback" not in ended.console


def test_without_locks_of_the_disk_there_is_one_writer_all_the_same(started, failing, tmp_path):
    folder = shutil.copytree(started, tmp_path / "run")
    job, owner = JOBS["extract_shard"], folder / f"{SHARD}.lock.owner"
    killed = failing.run(folder, job, at=40, answer=int(-signal.SIGKILL), no_locks=1)
    assert killed.status == -signal.SIGKILL
    assert owner.is_file()
    theirs = owner.read_text()
    owner.write_text("5 on node7\nnode7 another-boot net:[1]")
    refused = failing.run(folder, job, no_locks=1)
    assert refused.status == 1
    line = refused.log.splitlines()[-1]
    assert "another job writes it (process 5 on node7)" in line
    assert f"if that job was killed, remove {owner}" in line
    owner.write_text(theirs)  # of a job of this machine, which the kernel knows is gone
    again = failing.run(folder, job, no_locks=1)
    assert again.status == 0, again.log
    assert not list(folder.glob("shards/*.lock*"))
    assert len(theloom.open(folder / SHARD)) > 0
