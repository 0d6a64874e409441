"""A process that has imported what snakemake and the pipeline's jobs import, and forks for each of
them: a job of a tiny model is five seconds of imports, and else a fraction of a second.

Commands, scripts, their order, files and exit codes are the real ones, and each has a process and
an environment of its own. Tests of the process itself (its memory, its end by a signal) and the
run of an installed wheel start all as users do.
"""

import ast
import atexit
import functools
import gc
import importlib
import marshal
import os
import pkgutil
import re
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent / "preload"
# What libraries read when they are imported.
_SENSITIVE = re.compile(
    # the job sets its threads once more, and CUDA reads its devices when it starts
    r"(?!\w+_NUM_THREADS|CUDA_VISIBLE_DEVICES$)"
    r"(ATEN|CUDA|GOMP|HF|HUGGING|KMP|LD|MALLOC|MKL|OMP|OPENBLAS|PYTORCH|TORCH|TRANSFORMERS|XDG)_|"
    r"(GLIBC_TUNABLES|HOME|PYTHON(HASHSEED|OPTIMIZE|WARNINGS))$"
)
SHARED = "PRELOAD_SERVER"  # the address of a server that other processes may use

_LIBRARIES = (
    "docutils.core",
    "docutils.readers.standalone",
    "docutils.writers.html4css1",
    "docutils.writers.html5_polyglot",
    "gpuhunt",
    "h5py",
    "hydra",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_svg",
    "nbformat",
    "omegaconf._impl",
    "pygments.lexers.python",
    "pygments.styles.default",
    "sklearn.linear_model",
    "smart_open",
    "snakemake.assets",
    "snakemake.benchmark",
    "snakemake.cli",
    "snakemake.profiles",
    "snakemake.report",
    "snakemake.report.html_reporter",
    "snakemake.storage",
    "snakemake_storage_plugin_fs",
    "tokenizers",
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "torch.profiler",
    "xxhash",
)


@functools.cache
def server() -> str:
    """The address of the server, which is started for the first job: pytest's workers share that of
    the process that started them.
    """
    if SHARED in os.environ:
        return os.environ[SHARED]
    folder = tempfile.mkdtemp(prefix="preload")
    address = f"{folder}/socket"
    locking = {"HDF5_USE_FILE_LOCKING": "FALSE"}  # as jobs set it before h5py
    process = subprocess.Popen(
        [sys.executable, __file__, address], env=_as_jobs() | locking, start_new_session=True
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(process.kill)
    while not Path(address).exists():  # it answers later, which a job waits for
        assert process.poll() is None
        time.sleep(0.05)
    return address


def environment(*folders: Path) -> dict[str, str]:
    """The environment of a snakemake whose jobs find their libraries imported, with more folders to
    import from.
    """
    path = os.pathsep.join([*map(str, (FOLDER, *folders)), *_requested_path()])
    return _as_jobs() | {"PRELOADED": server(), "PYTHONPATH": path}


def _as_jobs() -> dict[str, str]:
    """The environment, with the settings of malloc that the pipeline makes."""
    from theloom.devices import host

    environment = dict(os.environ)
    host.reuse_freed_blocks(environment)
    return environment


class _Imported:
    """Gives torch, transformers and the checkout's own modules to the first import that asks for
    them: torch with the threads that the job has set by then, as an import would. A job whose path
    has other files of theloom imports those.
    """

    def __init__(self, asked: dict[str, list[str]]) -> None:
        self.asked = asked
        self.modules = _taken_away("torch", "transformers")
        self.ours = _taken_away("theloom")
        for name, module in self.ours.items():  # no package has what was not imported from it
            package, _, last = name.rpartition(".")
            if package and vars(self.ours[package]).get(last) is module:
                delattr(self.ours[package], last)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "theloom":
            found = PathFinder.find_spec(name)
            if found is None or not Path(found.origin or "").samefile(self.ours[name].__file__):
                self.ours = {}
        if name in self.ours:
            return ModuleSpec(name, self)  # type: ignore[arg-type]
        if name not in ("torch", "transformers") or not self.modules:
            return None
        if threads := os.environ.get("OMP_NUM_THREADS"):
            self.modules["torch"].set_num_threads(int(threads))
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in self.ours:
            module = self.ours[spec.name]
        else:
            sys.modules.update(self.modules)
            module, self.modules = self.modules[spec.name], {}
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec
        for name in self.asked.get(module.__name__, ()):
            importlib.import_module(name)


def _taken_away(*roots: str) -> dict[str, ModuleType]:
    modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in roots}
    for name in modules:
        del sys.modules[name]
    return modules


def _import_ours() -> dict[str, list[str]]:
    """Import the checkout's modules; returns what each of them imports on its own import."""
    import theloom

    for found in pkgutil.walk_packages(theloom.__path__, "theloom."):
        if not found.name.endswith(".__main__"):
            importlib.import_module(found.name)
    asked = {}
    for name, module in sys.modules.items():
        if name.partition(".")[0] != "theloom":
            continue
        asked[name] = names = []
        for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names += [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
        roots = ("theloom", "torch", "transformers")
        names[:] = [n for n in names if n in sys.modules and n.partition(".")[0] in roots]
    return asked


def _run(job: dict[str, Any], streams: list[int], installed: list[str]) -> None:
    """Be the job, in this process."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, limit in job["limits"]:
        resource.setrlimit(number, limit)
    tempfile.tempdir = None
    first, *others = job["arguments"]
    in_module = first == "-m"
    own = job["folder"] if in_module else str(Path(first).parent)
    sys.path[:] = [own, *_requested_path(), *installed]
    sys.argv[:] = others if in_module else [first]
    status = 0
    try:
        if in_module:
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # Python prints it
        status = ended.code or 0
    _end(status)


def _end(status: int) -> None:
    """End as Python does, but for freeing what was imported: that copies every page of it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _requested_path() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def _fill_caches() -> None:
    """What is done once in a process: snakemake looks for plugins, hydra for its own."""
    from hydra.core.plugins import Plugins
    from snakemake.cli import get_argument_parser

    get_argument_parser()
    Plugins.instance()
    fill_caches_of_jobs()


def fill_caches_of_jobs() -> None:
    """What each job would make for itself: transformers compiles a thousand expressions for the
    names of weights, and the schema of configs is made.
    """
    from theloom.config import frozen
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
    frozen.to_config({})


def _sensitive(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that libraries read when they are imported."""
    return {k: v for k, v in environment.items() if _SENSITIVE.match(k)}


class _Server:
    """Forks the jobs that processes hand over, and tells those how they end."""

    def __init__(self, listening: socket.socket, installed: list[str], read: dict[str, str]):
        self.installed, self.read = installed, read
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(listening, selectors.EVENT_READ, self.accept)

    def serve(self) -> None:
        while True:
            for key, _ in self.waiting.select():
                if self.waiting.get_map().get(key.fd) is key:  # not let go since
                    key.data(key.fileobj)

    def accept(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        self.waiting.register(connection, selectors.EVENT_READ, self.take)

    def take(self, connection: socket.socket) -> None:
        """Fork a job, unless its environment is not that of the imports."""
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        length = int.from_bytes(size, "big")
        with connection.makefile("rb") as incoming:
            data = incoming.read(length)
        self.waiting.unregister(connection)
        if not length or len(data) < length:  # it was killed
            connection.close()
        elif _sensitive((job := marshal.loads(data))["environment"]) != self.read:
            self.tell(connection, 0)
            connection.close()
        elif process := os.fork():
            self.tell(connection, process)
            self.watch(connection, process)
        else:
            connection.close()
            for key in [*self.waiting.get_map().values()]:
                os.close(key.fd)
            self.waiting.close()
            _run(job, streams, self.installed)  # from which a job does not return
        for stream in streams:
            os.close(stream)

    def watch(self, connection: socket.socket, process: int) -> None:
        """Wait for the job's end. Where the process that handed it over ends first, the job is
        killed, as the job's own process would have been.
        """
        ended = os.pidfd_open(process)

        def end(_: object) -> None:
            _, status = os.waitpid(process, 0)
            self.tell(connection, status)
            for watched in (ended, connection):
                with suppress(KeyError):
                    self.waiting.unregister(watched)
            os.close(ended)
            connection.close()

        def kill(_: object) -> None:
            os.kill(process, signal.SIGKILL)
            self.waiting.unregister(connection)

        self.waiting.register(ended, selectors.EVENT_READ, end)
        self.waiting.register(connection, selectors.EVENT_READ, kill)

    def tell(self, connection: socket.socket, number: int) -> None:
        with suppress(OSError):  # it was killed
            connection.sendall(f"{number}\n".encode())


def _serve(address: str) -> None:
    """Import the libraries once, and fork for each job."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"{address}.new")
    listening.listen(64)
    Path(f"{address}.new").rename(address)  # who finds it can connect
    mine = {str(Path(__file__).parent), str(FOLDER), *_requested_path()}
    installed = [folder for folder in sys.path if folder not in mine]
    read = _sensitive(dict(os.environ))  # some libraries add to it
    for name in _LIBRARIES:
        importlib.import_module(name)
    asked = _import_ours()
    _fill_caches()
    # here, since a job that touches every module copies their pages
    sys.meta_path.insert(0, _Imported(asked))  # type: ignore[arg-type]
    gc.collect()
    gc.freeze()  # a collection in a job copies none of it
    gc.set_threshold(20_000, 20, 20)  # a twelfth of a job's time was looking for garbage
    _Server(listening, installed, read).serve()


if __name__ == "__main__":
    _serve(sys.argv[1])
