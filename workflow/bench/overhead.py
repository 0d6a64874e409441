"""`python workflow/bench/overhead.py`: what Snakemake adds to the jobs of a small run in eight
shards, one at a time.

The wall time of the pipeline less the sum of its jobs' own, which Snakemake records with their
outputs.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
Requested = "name=run extraction.shards=8 corpus.max_tokens=512 verify.documents=1"


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            ROOT / "Snakefile",
            "--directory",
            folder,
        ]
        command += [
            "--profile",
            ROOT / "workflow/profiles/local",
            "--cores",
            "1",
            "--config",
            f"set={Requested}",
        ]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        records = [
            json.loads(path.read_text())
            for path in Path(folder, ".snakemake/metadata").rglob("*")
            if path.is_file()
        ]
    jobs = {(r["rule"], r["starttime"]): r["endtime"] - r["starttime"] for r in records}
    own = sum(jobs.values())
    print(
        f"{len(jobs)} jobs: {wall:.1f} s, of which the jobs' own {own:.1f} s "
        f"and {wall - own:.1f} s of overhead"
    )
    for (rule, _), seconds in sorted(jobs.items(), key=lambda job: -job[1]):
        print(f"  {rule}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
