"""`python workflow/bench/dry_runs.py [SHARDS:PER_JOB …]`: seconds and peak memory of a dry run of
Snakemake, by the number of shards and of shards in a job.

Nothing is computed: the profile 7b needs no model for its plan.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
USUAL = ["1000:1", "1000:10", "5000:1", "5000:10", "20000:100", "20000:1"]


def main() -> None:
    """Print the figures."""
    for word in sys.argv[1:] or USUAL:
        shards, per_job = map(int, word.split(":"))
        cut = f"extraction.shards={shards} resources.shards_per_job={per_job}"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
            command += ["--directory", folder, "--profile", str(ROOT / "workflow/profiles/local")]
            command += ["--dry-run", "--quiet", "all", "--config", "profiles=7b", f"set={cut}"]
            began = time.perf_counter()
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running = subprocess.Popen(command, cwd=ROOT, **silent)
            _, status, used = os.wait4(running.pid, 0)
            seconds = time.perf_counter() - began
        print(
            json.dumps(
                {
                    "shards": shards,
                    "shards_per_job": per_job,
                    "seconds": round(seconds, 1),
                    "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
                    "peak_mb": round(used.ru_maxrss / 1000),
                    "exit": os.waitstatus_to_exitcode(status),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
