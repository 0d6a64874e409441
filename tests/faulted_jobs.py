"""Runs the pipeline's scripts as processes of their own on a disk that fails (`faults.c`).

As a program it is a server under LD_PRELOAD that has torch loaded and forks a child for each job;
`Disk` is its client.
"""

import atexit
import ctypes
import gc
import json
import os
import select
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "fsspec.implementations.local",
    "h5py",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "mpl_toolkits.mplot3d",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "theloom.answers.gather",
    "theloom.answers.shard",
    "transformers.models.llama.modeling_llama",
    "theloom.corpus.in_parts.gather",
    "theloom.pipeline.bars",
    "theloom.pipeline.extract_shard",
    "theloom.pipeline.job",
    "theloom.pipeline.load_model",
    "theloom.pipeline.push",
    "theloom.pipeline.retries",
    "theloom.pipeline.stage_model",
    "theloom.report.draw",
    "theloom.report.page",
    "transformers.models.auto.tokenization_auto",
    "theloom.verification.in_parts",
)


_SECONDS = 1200  # of a job of seconds, the first one's imports included: it hangs


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit status (negative: by that signal), its log, what the console got,
    and how many calls wrote.
    """

    status: int
    log: str
    console: str
    calls: int


class Disk:
    """Runs jobs of one run's folder."""

    def __init__(self, server: subprocess.Popen[str], scratch: Path) -> None:
        self._server, self._scratch = server, scratch

    def run(self, folder: Path, job: dict[str, Any], **fault: Any) -> Ended:
        """Run one script.

        Args:
            folder: of the run; calls that write below it are counted.
            job: `script`, and `input`, `output`, … of `snakemake`, relative to the folder.
            **fault: `at`, the call that fails (0: none); `answer`, an errno or a negative signal;
                `no_locks`; `log`, its path.
        """
        log = Path(fault.pop("log", folder / "logs/job.log"))
        log.parent.mkdir(exist_ok=True)
        counter, console = self._scratch / "calls", self._scratch / "console"
        counter.write_bytes(bytes(8))
        console.write_bytes(b"")
        task = {"folder": str(folder), "log": str(log), "counter": str(counter), **job, **fault}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], _SECONDS)[0]:
            self._server.kill()
            raise TimeoutError(f"{job['script']} hangs: {fault}")
        status = int(self._server.stdout.readline())
        text = log.read_text(errors="replace") if log.is_file() else ""
        calls = int(np.frombuffer(counter.read_bytes(), "<i8")[0])
        return Ended(os.waitstatus_to_exitcode(status), text, console.read_text(), calls)


@contextmanager
def disk(scratch: Path) -> Iterator[Disk | None]:
    """A server with the failing disk; None where there is no C compiler."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        yield None
        return
    library = scratch / "faults.so"
    source = str(ROOT / "tests/faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    (scratch / "console").touch()
    with (scratch / "console").open("a") as console:
        server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=console,
            text=True,
            env=os.environ
            | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
            | {"HDF5_USE_FILE_LOCKING": "FALSE"},  # as a job sets it before it imports h5py
        )
    try:
        yield Disk(server, scratch)
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


class _Named(list):  # type: ignore[type-arg]
    """Snakemake's named lists: `output[0]`, `output.tokens`."""

    def __init__(self, named: dict[str, Any]) -> None:
        super().__init__(named.values())
        self.__dict__.update(named)


def _child(task: dict[str, Any]) -> None:
    import runpy

    folder = task["folder"]

    def named(section: str) -> _Named:
        def path(value: Any) -> Any:
            return [path(v) for v in value] if isinstance(value, list) else f"{folder}/{value}"

        return _Named({k: path(v) for k, v in task.get(section, {}).items()})

    snakemake = SimpleNamespace(
        log=[task["log"]],
        threads=1,
        resources={},
        input=named("input"),
        output=named("output"),
        wildcards=SimpleNamespace(**task.get("wildcards", {})),
        params=SimpleNamespace(**task.get("params", {})),
        scriptdir=str(ROOT / "workflow/scripts"),
    )
    for output in snakemake.output:  # as Snakemake does
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    arguments = (ctypes.c_long(task.get("at", 0)), task.get("answer", 0), task.get("no_locks", 0))
    ctypes.CDLL(None).faults_arm(folder.encode(), *arguments, task["counter"].encode())
    script = ROOT / "workflow/scripts" / f"{task['script']}.py"
    runpy.run_path(str(script), {"snakemake": snakemake})


def _end_of(task: dict[str, Any]) -> NoReturn:
    """Run a job and end as an interpreter does, but for its freeing of every module."""
    status = 1
    try:
        _child(task)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    from preloading import fill_caches_of_jobs
    from theloom.store import writer

    fill_caches_of_jobs()
    torch.set_num_threads(1)
    writer.COMMIT_BYTES = 1 << 14
    gc.collect()
    gc.freeze()  # a collection in a job copies none of it
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, 9)  # killed with its server
            _end_of(json.loads(line))
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    _serve()
