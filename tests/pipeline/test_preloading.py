"""The tests' own server of jobs takes them, whatever the other tests of a worker have imported."""

import subprocess
import sys

import preloading


def test_the_server_takes_jobs_with_the_environment_of_the_tests(tmp_path):
    script = tmp_path / ".snakemake/scripts/tmp.job.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "print(Path(f'/proc/{os.getppid()}/cmdline').read_text().split(chr(0))[1])\n"
    )
    found = subprocess.run(
        [sys.executable, script], env=preloading.environment(), capture_output=True, text=True
    )
    # else each job imports torch by itself, without a word
    assert found.stdout.strip() == preloading.__file__, found.stderr
