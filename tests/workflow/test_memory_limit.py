"""The pipeline under a memory limit that the kernel enforces: within the predicted peak it passes,
below it stops.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Project
from theloom.planning.estimates import estimate_file

REQUESTED = "corpus.max_tokens=600 verify.documents=1 extraction.execution=resident"
RUN = "smollm2-135m+max_tokens=600+documents=1+execution=resident"


class Cgroup:
    """A memory cgroup of the real kernel, v1 or v2."""

    def __init__(self) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.folder = (v1 if v1.is_dir() else v2) / f"theloom-test-{os.getpid()}"
        self._limit = "memory.limit_in_bytes" if v1.is_dir() else "memory.max"
        self.folder.mkdir()

    def limit(self, nbytes: int) -> None:
        (self.folder / self._limit).write_text(str(nbytes))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    try:
        group = Cgroup()
        group.limit(1 << 40)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    group.folder.rmdir()


def run_within(
    cgroup: Cgroup, project: Project, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = project.command(*arguments, overrides=REQUESTED)
    options = {"cwd": project.folder, "capture_output": True, "text": True, "timeout": 1800}
    return subprocess.run(command, preexec_fn=cgroup.enter, **options)


@pytest.mark.usefixtures("smollm2")
def test_a_run_fits_its_predicted_peak_and_below_stops_before_loading(cgroup, project):
    before = ("estimate_memory", "stage_model", "tokenize_corpus")  # which are not limited
    first = project.snakemake("--until", *before, overrides=REQUESTED)
    assert first.returncode == 0, first.stderr
    predicted = estimate_file.read(project.results(RUN) / "estimate.h5")
    cgroup.limit(int(0.78 * predicted.host["fp32"]))
    refused = run_within(cgroup, project)
    log = (project.results(RUN) / "logs/load_model.log").read_text()
    assert refused.returncode != 0
    assert "error: the run needs at least" in refused.stderr
    assert "limited by the cgroup" in refused.stderr
    assert "it would fit with memory.precision_mode=bf16 (saves" in refused.stderr
    assert "loaded package" not in log
    assert "Traceback" not in refused.stderr
    cgroup.limit(int(1.1 * predicted.host["fp32"]))
    passed = run_within(cgroup, project)
    assert passed.returncode == 0, passed.stderr
    assert "verified: 1 documents recomputed" in passed.stderr
