"""`python workflow/bench/shards_per_job.py [SHARDS] [PER_JOB …]`: seconds of a run whose jobs
extract one shard each, and of runs whose jobs extract several with the model loaded once.

SmolLM2 over 128 tokens a shard, on two cores; rounds are interleaved, so that neighbours of the
machine slow all alike. The extraction and the merge are timed.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS = 2


def snakemake(folder: Path, assignments: str, until: str) -> float:
    """Run the pipeline up to a rule.

    Args:
        folder: Working directory of Snakemake.
        assignments: The text of `set`.
        until: The rule.

    Returns:
        Seconds.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile"]
    command += ["--directory", folder, "--profile", ROOT / "workflow/profiles/local"]
    command += ["--cores", "2", "--until", until, "--config", f"set={assignments}"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began


def main() -> None:
    """Print the figures."""
    shards, *sizes = [int(word) for word in sys.argv[1:]] or [16, 8]
    cut = f"extraction.shards={shards} corpus.max_tokens={128 * shards} verify.documents=1"
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), dict[int, list[float]]()
        runs = {n: f"name=by-{n} {cut} resources.shards_per_job={n}" for n in (1, *sizes)}
        for assignments in runs.values():
            snakemake(folder, assignments, "load_model")
        for _ in range(ROUNDS):
            for per_job, assignments in runs.items():
                shutil.rmtree(folder / f"results/by-{per_job}/shards", ignore_errors=True)
                taken = snakemake(folder, assignments, "merge_shards")
                seconds.setdefault(per_job, []).append(taken)
    middle = {n: statistics.median(taken) for n, taken in seconds.items()}
    for per_job, taken in seconds.items():
        rounds = [round(s, 1) for s in taken]
        share = middle[per_job] / middle[1]
        print(json.dumps({"shards_per_job": per_job, "seconds": rounds, "share": round(share, 3)}))


if __name__ == "__main__":
    main()
