"""A lease on GPUs: jobs of one machine that run at the same time hold distinct ones.

A lease is a lock of the operating system on a file named after the GPU's UUID: the kernel gives it
back when its holder ends, however it ends. Jobs of all users of the machine share the files. Where
a scheduler has assigned GPUs to the job, those are its own and no lease is needed. Containers have
the files of their own /tmp: they hold distinct GPUs only where they share it.
"""

import fcntl
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theloom import terminal
from theloom.devices import boards
from theloom.errors import ConfigError

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60
_held: tuple[str, ...] = ()  # of this process


@dataclass(frozen=True)
class Candidate:
    """A GPU that may be leased. `free` is bytes, None where it is not known; `users` says in words
    who has the rest. `variables` of the environment show it to programs: the first takes UUIDs.
    """

    uuid: str
    free: int | None = None
    users: str = ""
    variables: tuple[str, ...] = ("CUDA_VISIBLE_DEVICES",)


def held() -> tuple[str, ...]:
    """Tell which GPUs this process has leased.

    Returns:
        UUIDs in the order of torch's numbers; what the scheduler wrote where it assigned them.
    """
    return _held


def of_job(resources: Any, device: str) -> AbstractContextManager[tuple[str, ...]]:
    """Hold the GPUs that a job of Snakemake asks for by its resources.

    Args:
        resources: the job's: `gpu` (how many), `min_free_gpu_mb` (MB of 10⁶ bytes).
        device: `extraction.device`.

    Returns:
        The context manager of `gpus`.
    """
    return gpus(resources.get("gpu", 0), 10**6 * resources.get("min_free_gpu_mb", 0), device)


@contextmanager
def gpus(count: int, needed: int = 0, device: str = "auto") -> Iterator[tuple[str, ...]]:
    """Hold GPUs and show this process no other; nothing happens on machines without.

    To be entered before torch looks for GPUs. Waits while others hold them, and says for whom.
    Where the GPUs that nobody holds have too little free, the ones with most are taken: the plan
    then makes batches smaller, or refuses.

    Args:
        count: how many.
        needed: bytes to be free on each.
        device: `auto`, `cuda` or `cuda:N`; of any other no GPU is held.

    Yields:
        UUIDs of the GPUs; empty where none is held.

    Raises:
        ConfigError: the machine has fewer GPUs than requested.
    """
    global _held
    if count < 1 or device.partition(":")[0] not in ("auto", "cuda"):
        yield ()
        return
    if assigned := assigned_by_scheduler():
        log.info("GPUs assigned by the scheduler: %s", ", ".join(assigned))
        _held = _one_process_can_use(assigned[:count])
        try:
            yield _held
        finally:
            _held = ()
        return
    if not (shown := visible(_candidates())):
        yield ()
        return
    variables = shown[0].variables

    def look() -> list[Candidate]:
        found = visible(_candidates())
        if ":" not in device:
            whole = [one for one in found if not one.uuid.startswith("MIG-")]
            if count > 1 and len(whole) < count:
                _one_process_can_use([one.uuid for one in found[:count]])
            return whole if count > 1 else found
        if "CUDA_VISIBLE_DEVICES" not in os.environ:  # else they are in CUDA's order already
            found = _by_cuda_number(found)
        return found[int(device.partition(":")[2]) :][:1]

    with leased(look, count, needed) as found:
        before = {name: os.environ.get(name) for name in variables}
        if ":" not in device:  # else numbers are the user's, and stay
            _show(dict.fromkeys(variables) | {variables[0]: ",".join(found)})
        _held = found
        try:
            yield found
        finally:
            _held = ()
            _show(before)


def _show(values: Mapping[str, str | None]) -> None:
    """Set variables of this process, or remove them."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _one_process_can_use(names: Sequence[str]) -> tuple[str, ...]:
    """The same GPUs. Raises ConfigError for two MIG instances: CUDA shows a process one alone."""
    if len(names) > 1 and any(name.startswith("MIG-") for name in names):
        raise ConfigError(
            f"resources.gpu: {len(names)} GPUs are requested, and they are MIG instances, of which "
            "a process can use one; set resources.gpu=1, or extraction.execution=layerwise"
        )
    return tuple(names)


def assigned_by_scheduler() -> tuple[str, ...]:
    """Tell what Slurm, PBS, LSF or Grid Engine has given to this job.

    Returns:
        GPUs as they write them in CUDA_VISIBLE_DEVICES, or for AMD's in ROCR_VISIBLE_DEVICES; empty
        outside of such a job.
    """
    batch = any(name in os.environ for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))
    grid_engine = "JOB_ID" in os.environ and any(name.startswith("SGE_") for name in os.environ)
    shown = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"))
    names = next(filter(None, shown), "")
    return tuple(filter(None, names.split(","))) if batch or grid_engine else ()


def _candidates() -> list[Candidate]:
    """The machine's GPUs, or where they are in MIG mode their instances, in the driver's order."""
    found: list[Candidate] = []
    for board in boards.read().devices:
        for device in board.instances if board.mig else [board]:
            users = ", ".join(
                f"{p.name} (pid {p.pid}{', vLLM' if p.is_vllm else ''})" for p in device.processes
            )
            found.append(Candidate(device.uuid, device.free, users, device.visible))
    return found


def visible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Choose the GPUs that CUDA_VISIBLE_DEVICES shows: by UUID or the beginning of one, or by
    CUDA's number. Of AMD's GPUs those that ROCR_VISIBLE_DEVICES shows, and of them those of
    HIP's numbers.

    Args:
        candidates: all GPUs of the machine.

    Returns:
        Those shown, in the order of the variable; as CUDA does, it stops at the first entry that
        names none.

    Raises:
        ConfigError: numbers cannot be told apart.
    """
    if not candidates:
        return []
    outer, *inner = (os.environ.get(name) for name in candidates[0].variables)
    shown = list(candidates) if outer is None else _named(candidates, outer)
    numbers = next((names for names in inner if names is not None), None)
    return shown if numbers is None else _named(shown, numbers)


def _named(candidates: Sequence[Candidate], names: str) -> list[Candidate]:
    """Those that a variable names, in its order."""
    found: list[Candidate] = []
    numbered: list[Candidate] | None = None
    for name in (n.strip() for n in names.split(",")):
        if name.isdigit():
            numbered = _by_cuda_number(candidates) if numbered is None else numbered
            matching = numbered[int(name) :][:1]
        else:
            matching = [c for c in candidates if name and c.uuid.startswith(name)]
        if len(matching) != 1:
            break
        found += matching
    return found


def _by_cuda_number(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The GPUs as CUDA numbers them: as the driver does if CUDA_DEVICE_ORDER says PCI_BUS_ID, else
    fastest first.
    """
    amd = any("ROCR_VISIBLE_DEVICES" in c.variables for c in candidates)  # HIP's order already
    if amd or len(candidates) < 2 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return list(candidates)
    names = {board.name for board in boards.read().devices}
    if len(names) == 1:
        return list(candidates)  # none is faster: CUDA keeps the driver's order
    # only CUDA knows, and asking it here would settle what this process sees
    script = "from theloom.devices import accelerator; "
    script += "[print('GPU-' + gpu.uuid) for gpu in accelerator.properties()]"
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    by_uuid = {c.uuid: c for c in candidates}
    if told.returncode or not all(uuid in by_uuid for uuid in told.stdout.split()):
        raise ConfigError(
            "GPUs are named by numbers, and this machine's GPUs differ; set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, or "
            "name GPUs by their UUIDs (nvidia-smi -L)"
        )
    return [by_uuid[uuid] for uuid in told.stdout.split()]


@contextmanager
def leased(
    look: Callable[[], list[Candidate]],
    count: int,
    needed: int = 0,
    folder: Path | None = None,
    pause: float = 1.0,
) -> Iterator[tuple[str, ...]]:
    """Hold some of the GPUs that `look` finds, all of them or none: two waiting jobs cannot block
    each other. A job that asks for several can be overtaken by jobs that ask for fewer.

    Args:
        look: finds the GPUs, anew at each attempt.
        count: how many to hold.
        needed: bytes to be free on each.
        folder: where the locks are; None: the machine's.
        pause: about the seconds between attempts.

    Yields:
        UUIDs of the GPUs.

    Raises:
        ConfigError: there are fewer GPUs than requested.
    """
    folder = _lock_folder() if folder is None else folder
    said = -float(SECONDS_BETWEEN_LINES)
    while True:
        candidates = look()
        if len(candidates) < count:
            raise ConfigError(
                f"resources.gpu: {count} GPUs are requested, and {len(candidates)} are here"
            )
        with _gate(
            folder
        ):  # one attempt at a time: none takes another's look at a lock for a lease
            locks, busy = _attempt(candidates, count, needed, folder)
        if locks:
            break
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log.info(
                "waiting for %d of %d GPUs; they are held by %s",
                count,
                len(candidates),
                _holders(folder, busy),
            )
        time.sleep(pause * random.uniform(0.5, 1.5))  # so that waiting jobs do not keep in step
    try:
        log.info("leased %s", ", ".join(locks))
        yield tuple(locks)
    finally:
        _release(locks)


@contextmanager
def _gate(folder: Path) -> Iterator[None]:
    file = _opened(folder / "gate")
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


def _attempt(
    candidates: list[Candidate], count: int, needed: int, folder: Path
) -> tuple[dict[str, int], list[str]]:
    """Locks by UUID, and the UUIDs that others hold.

    The locks are of GPUs with `needed` bytes free, or of the freest if nobody holds one. There are
    none if the job is to wait.
    """
    locks: dict[str, int] = {}
    for candidate in sorted(candidates, key=lambda c: -(c.free or 0)):
        file = _locked(folder / f"{candidate.uuid}.lock")
        if file is not None:
            locks[candidate.uuid] = file
    busy = [c.uuid for c in candidates if c.uuid not in locks]
    able = [c.uuid for c in candidates if c.uuid in locks and (c.free is None or c.free >= needed)]
    chosen = able[:count]
    if len(chosen) < count and not busy:  # nobody to wait for: strangers have the memory
        chosen = list(locks)[:count]
        for c in candidates:
            if c.uuid in chosen and c.uuid not in able:
                log.warning(
                    "GPU %s has %s free, less than the %s that the job needs; others on it: %s",
                    c.uuid,
                    terminal.format_bytes(c.free or 0),
                    terminal.format_bytes(needed),
                    c.users or "not known",
                )
    if len(chosen) < count:
        _release(locks)
        return {}, busy
    _release({uuid: file for uuid, file in locks.items() if uuid not in chosen})
    for uuid in chosen:
        os.truncate(locks[uuid], 0)
        os.pwrite(locks[uuid], f"pid {os.getpid()}".encode(), 0)
    return {uuid: locks[uuid] for uuid in chosen}, busy


def _locked(path: Path) -> int | None:
    """The open file of a lock that is now ours, None if another has it."""
    file = _opened(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _opened(path: Path) -> int:
    """Open a lock's file, made where it is not there; programs that this process starts do not
    inherit it.
    """
    options = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, options)
    except FileNotFoundError:
        file = os.open(path, options | os.O_CREAT, 0o666)
        os.fchmod(file, 0o666)  # whatever the umask: the next job may be another user's
        return file


def _release(locks: dict[str, int]) -> None:
    for file in locks.values():
        os.close(file)


def _lock_folder() -> Path:
    """One folder for all users of the machine, whatever their TMPDIR."""
    place = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    folder = place / "theloom-gpus"
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    return folder


def _holders(folder: Path, busy: list[str]) -> str:
    words = [
        f"{(folder / f'{uuid}.lock').read_text()[:40] or 'another job'} ({uuid})" for uuid in busy
    ]
    return ", ".join(words) or "nobody, but have too little memory free"
