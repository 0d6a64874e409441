"""`python workflow/bench/many_shards.py plan` and `… run`: a run of very many shards.

`plan` measures what Snakemake needs for the plan alone (`-n`, Slurm's profile) at several numbers
of shards. `run` sends a tiny model's shards through a real Slurm on this machine's loopback while
jobs are cancelled at random, the controller is away for a while, and Snakemake itself is killed and
started again as workflow/docs/clusters.md says. It needs root and Debian's slurmctld, slurmd,
slurm-client and munge. The node claims as many CPUs as there are slots.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import h5py
from filelock import FileLock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # its Slurm and its tiny models

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
QUICK = ["--slurm-init-seconds-before-status-checks", "1", "--max-status-checks-per-second", "2"]
QUICK += ["--latency-wait", "5"]
DOCUMENTS_OF_SHARD = 2
EXTRACTION = "rule_extract_shard"


def plan(shards: int, per_job: int | None, limit: float) -> str:
    """One row of the table of plans: wall and processor seconds, and peak MB, of `snakemake -n`.

    Args:
        shards: Of the run.
        per_job: `resources.shards_per_job`; None leaves the key out.
        limit: Seconds after which it is ended.

    Returns:
        A row in Markdown.
    """
    cut = f"extraction.shards={shards}"
    cut += "" if per_job is None else f" resources.shards_per_job={per_job}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "all"]
        command += ["--snakefile", str(ROOT / "Snakefile"), "--directory", folder]
        command += ["--profile", str(ROOT / "workflow/profiles/slurm"), "--config", f"set={cut}"]
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with Path(folder, "printed.txt").open("w") as printed:
            process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed)
        peak = 0
        while process.poll() is None and time.perf_counter() - began < limit:
            peak = max(peak, peak_mb(process.pid))
            time.sleep(0.2)
        wall = time.perf_counter() - began
        if process.poll() is None:
            process.kill()
            process.wait()
            return f"| {shards} | {per_job or 1} | over {limit:.0f} s | ended | {peak} MB so far |"
        if process.returncode:
            sys.exit(Path(folder, "printed.txt").read_text()[-2000:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return f"| {shards} | {per_job or 1} | {wall:.1f} s | {cpu:.1f} s | {peak} MB |"


def peak_mb(pid: int) -> int:
    """The largest resident memory of a process until now, in MB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 // 1_000_000 if found else 0


@dataclass
class Ordeal:
    """A run in a project's folder, and what befalls it."""

    folder: Path
    slurm: object
    shards: int
    requested: list[str]
    environment: dict[str, str]
    victims: set[int]
    latest: float
    kills_of_snakemake: list[int]
    outage_after: int
    outage_seconds: float
    running: subprocess.Popen | None = None
    seen: list[str] = field(default_factory=list)
    doomed: dict[str, float] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    peak: int = 0
    away_since: float | None = None
    outages: int = 0
    restarts: int = 0

    def finished(self) -> int:
        """Shards that have their final name."""
        return len(list(self.folder.glob("results/run/shards/*.h5")))

    def snakemake(self, *options: str) -> subprocess.Popen:
        """Start it, as a process of its own also where jobs are forks; what it prints is kept."""
        program = "from snakemake.cli import main; main()"
        with (self.folder / "printed.txt").open("a") as printed:
            return subprocess.Popen(
                [sys.executable, "-c", program, *options, *self.requested],
                cwd=self.folder,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
                env=self.environment,
            )

    def start(self) -> None:
        """Start the run, or go on with it."""
        profile = self.folder / "workflow/profiles/slurm"
        options = ["--profile", str(profile), *QUICK, "--rerun-incomplete"]
        self.running = self.snakemake(*options)

    def kill_snakemake(self) -> None:
        """kill -9 of it, and what the page on clusters says to do then."""
        os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()
        if jobs := self.slurm.jobs():
            self.slurm.ask("scancel", *jobs)
        while self.slurm.jobs():
            time.sleep(0.5)
        if self.snakemake("--unlock").wait():
            raise SystemExit("error: Snakemake does not unlock the folder")
        self.restarts += 1
        self.start()

    def kill_jobs(self) -> None:
        """Cancel those that chance has chosen, some seconds after their start.

        Slurm sends SIGTERM first, and SIGKILL after its KillWait: no kill -9.
        """
        listed = self.slurm.ask("squeue", "--noheader", "--states=R", "--format", "%i %k")
        for line in listed.splitlines():
            job, _, comment = line.partition(" ")
            if comment.startswith(EXTRACTION) and job not in self.seen:
                if len(self.seen) in self.victims:
                    self.doomed[job] = time.monotonic() + random.uniform(1, self.latest)
                self.seen.append(job)
        for job in [job for job, at in self.doomed.items() if at < time.monotonic()]:
            del self.doomed[job]
            self.slurm.ask("scancel", job)
            self.killed.append(job)

    def step(self) -> None:
        """Look once, and do what is due."""
        self.peak = max(self.peak, peak_mb(self.running.pid))
        done = self.finished()
        if self.away_since is not None:
            if time.monotonic() - self.away_since >= self.outage_seconds:
                self.slurm.start("slurmctld")
                self.slurm.wait_until_ready(120)
                self.away_since = None
            return
        if not self.outages and done >= self.outage_after:
            self.slurm.stop("slurmctld")
            self.away_since, self.outages = time.monotonic(), 1
            return
        if self.kills_of_snakemake and done >= self.kills_of_snakemake[0]:
            del self.kills_of_snakemake[0]
            self.kill_snakemake()
        self.kill_jobs()

    def endure(self) -> float:
        """Run to the end; returns seconds."""
        began = time.monotonic()
        self.start()
        while self.running.poll() is None or self.away_since is not None:
            self.step()
            time.sleep(0.5)
        if self.running.returncode:
            raise SystemExit((self.folder / "printed.txt").read_text()[-3000:])
        return time.monotonic() - began


def seconds(run_time: str) -> int:
    """Slurm's `RunTime`.

    Examples:
        >>> seconds("1-00:01:05")
        86465
    """
    days, _, clock = run_time.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + rest


def prepare(folder: Path, shards: int, cut: str) -> None:
    """A project with a corpus of so many shards, and a tiny model that reads bytes. What comes
    before the shards is made here, by the pipeline and without Slurm.
    """
    from support import build_tiny, copy_project, with_bytes

    project = copy_project(folder)
    model = with_bytes(build_tiny("llama", folder / "model", vocab_size=260))
    with (folder / "corpus.jsonl").open("w") as corpus:
        for n in range(shards * DOCUMENTS_OF_SHARD):
            corpus.write(json.dumps({"text": f"Document {n} of a corpus for very many shards."}))
            corpus.write("\n")
    (folder / "config/profile/many.yaml").write_text(
        f"# @package _global_\nmodel:\n  source: {model}\nmemory:\n"
        f"  activation_cache_filter: [{', '.join(HOOKS)}]\nextraction:\n  device: cpu\n"
    )
    done = project.snakemake("--until", "load_model", profiles="many", overrides=cut)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def missing(folder: Path, shards: int) -> list[str]:
    """What a finished run should have and has not; one line each."""
    results = folder / "results/run"
    found = sorted(results.glob("shards/*.h5"))
    lines = [] if len(found) == shards else [f"{len(found)} of {shards} shards"]
    lines += [f"left over: {p.name}" for p in results.glob("shards/*") if p.suffix != ".h5"]
    verifying = [sys.executable, "-m", "theloom.cli", "verify", str(results / "activations.h5")]
    done = subprocess.run(verifying, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines.append(f"theloom verify: {(done.stdout + done.stderr).strip()[-300:]}")
    with h5py.File(results / "tokens.h5") as file:
        tokens = len(file["tokens/input_ids"])
    with h5py.File(results / "activations.h5") as file:
        stored = {hook: len(file[f"hooks/{hook}/activations"]) for hook in file["hooks"]}
    if stored != dict.fromkeys(HOOKS, tokens):
        lines.append(f"{tokens} tokens, and rows: {stored}")
    return lines


def largest_difference(folder: Path, documents: int = 16) -> float:
    """Between rows of some documents, of the first two hook points, and plain `transformers`."""
    import theloom
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "model").eval()
    worst = 0.0
    acts = theloom.open(folder / "results/run/activations.h5")
    offsets, ids = acts.document_offset, torch.as_tensor(acts.rows["input_id"])
    with torch.inference_mode():
        for number in random.sample(range(len(offsets) - 1), documents):
            rows = slice(int(offsets[number]), int(offsets[number + 1]))
            states = model(ids[rows][None].long(), output_hidden_states=True).hidden_states
            for hook, layer in ((HOOKS[0], 0), (HOOKS[1], 2)):
                found = torch.as_tensor(acts[hook][rows])
                if found.shape != states[layer][0].shape:
                    return float("inf")
                worst = max(worst, (found - states[layer][0]).abs().max().item())
    return worst


def run(
    shards: int,
    slots: int,
    per_job: int | None,
    share: float,
    outage: float,
    latest: float,
    preloaded: bool,
) -> None:
    """Print what a run went through, and whether something is missing.

    Args:
        shards: Of the run.
        slots: Jobs at once.
        per_job: `resources.shards_per_job`; None leaves the key out.
        share: Of the extraction's jobs, that are killed.
        outage: Seconds that the controller is away.
        latest: Seconds after its start, at most, at which a job is cancelled.
        preloaded: Jobs are forks of one process that has imported their libraries.
    """
    import preloading
    import slurm as slurm_here

    cut = f"name=run corpus=text corpus.path=corpus.jsonl extraction.shards={shards}"
    cut += " resources.threads=1 resources.mem_mb=1500 resources.runtime=120 verify.documents=4"
    cut += "" if per_job is None else f" resources.shards_per_job={per_job}"
    planned = -(-shards // (per_job or 1))
    victims = random.sample(range(planned), max(1, round(share * planned)))
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.chmod(0o755)  # munge wants to trust the way to its socket
        project, controller = place / "project", place / "slurm"
        project.mkdir()
        controller.mkdir()
        prepare(project, shards, cut)
        # /etc/slurm is the machine's
        stack.enter_context(FileLock("/tmp/theloom-tests-slurm.lock"))
        slurm_here.install()
        slurm = slurm_here.start(controller, slots, memory_seconds=60)
        requested = ["--jobs", str(slots), "--config", "profiles=many", f"set={cut}"]
        ordeal = Ordeal(
            project,
            slurm,
            shards,
            requested,
            preloading.environment() if preloaded else dict(os.environ),
            set(victims),
            latest,
            [max(1, shards // 4), max(2, shards * 3 // 4)],
            max(1, shards // 2),
            outage,
        )
        try:
            wall = ordeal.endure()
            records = slurm.records()
        finally:
            if ordeal.running and ordeal.running.poll() is None:
                os.killpg(ordeal.running.pid, signal.SIGKILL)
            if "slurmctld" not in slurm.daemons:
                slurm.start("slurmctld")
                slurm.wait_until_ready(120)
            slurm_here.stop(slurm)
        extracting = [r for r in records if r.get("Comment", "").startswith(EXTRACTION)]
        own = sum(seconds(record["RunTime"]) for record in records)
        print(
            f"{shards} shards, {len(HOOKS)} hook points, {planned} jobs of extraction, "
            f"{slots} slots, {os.cpu_count()} cores (load {os.getloadavg()[1]:.1f}): "
            f"{wall:.0f} s, the jobs' own {own} s together; {len(records)} jobs, of them "
            f"{len(extracting) - planned} of extraction more than planned; cancelled: "
            f"{len(ordeal.killed)} jobs, Snakemake killed {ordeal.restarts} times; controller away "
            f"{ordeal.outages} times for {outage:.0f} s; peak of Snakemake {ordeal.peak} MB"
            f"{'; jobs forked' if preloaded else ''}"
        )
        if lines := missing(project, shards):
            sys.exit("error: " + "; ".join(lines))
        worst = largest_difference(project)
        print(f"finished, verified, nothing missing; rows within {worst:.1e} of plain transformers")
        if worst > 1e-5:
            sys.exit("error: rows differ")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("--shards", type=int, nargs="+", default=None, help="run: one number")
    parser.add_argument("--per-job", type=int, help="resources.shards_per_job")
    parser.add_argument("--slots", type=int, default=64, help="jobs at once")
    parser.add_argument("--killed", type=float, default=0.05, help="share of the jobs")
    parser.add_argument("--outage", type=float, default=30, help="seconds")
    parser.add_argument("--latest", type=float, default=20, help="seconds until a job is killed")
    parser.add_argument("--preloaded", action="store_true", help="jobs fork one process")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of one plan")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of jobs")
    asked = parser.parse_args()
    random.seed(asked.seed)
    if asked.what == "plan":
        print("| shards | shards of a job | wall | processor | peak |\n|---|---|---|---|---|")
        for shards in asked.shards or (1000, 5000, 20_000):
            print(plan(shards, asked.per_job, asked.limit), flush=True)
        return
    (shards,) = asked.shards or [1000]
    run(
        shards,
        asked.slots,
        asked.per_job,
        asked.killed,
        asked.outage,
        asked.latest,
        asked.preloaded,
    )


if __name__ == "__main__":
    main()
