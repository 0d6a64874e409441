"""The host's memory as this process may use it: the machine's, less where a cgroup or `ulimit -v`
says less.

A cgroup's limit is what the kernel kills by, on a laptop with systemd, in a container and in a
Slurm job alike, and no library asks for it: psutil sees the machine. Read from the kernel's own
files, cgroup v1 and v2 (kernel documentation, admin-guide/cgroup-v1/memory.rst and
admin-guide/cgroup-v2.rst; the paths by cgroups(7)). Elsewhere than on Linux there are no such
files, and the answer is psutil's.
"""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory: the whole, and what is free for this process.

    `limited_by` says in words what makes them less than the machine's own, "" where nothing does.
    """

    total: int
    free: int
    limited_by: str = ""

    @property
    def used(self) -> int:
        """Bytes that are not free, whoever uses them."""
        return self.total - self.free


def memory(root: Path = ROOT) -> DeviceMemory:
    """Measure the memory that this process may have.

    Args:
        root: where /proc and /sys are looked for.

    Returns:
        Bytes: `total` and `free` are each the least of all bounds; `limited_by` names the bound
        with the least free.
    """
    machine = psutil.virtual_memory()
    bounds = [DeviceMemory(machine.total, machine.available), *_cgroups(root), *_address_space()]
    tightest = min(bounds, key=lambda b: (b.free, b.total))
    smallest = min(bounds, key=lambda b: b.total)
    return DeviceMemory(
        smallest.total, max(tightest.free, 0), tightest.limited_by or smallest.limited_by
    )


def resident() -> int:
    """Measure the resident memory of this process.

    Returns:
        Bytes.
    """
    return int(psutil.Process().memory_info().rss)


def resident_files() -> int:
    """Measure what of this process's resident memory are pages of files.

    Returns:
        Bytes; 0 where the kernel does not tell.
    """
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def peak_resident() -> int:
    """Measure the peak of this process's resident memory since its start or the last
    `reset_peak_resident`.

    Returns:
        Bytes.
    """
    status = _text(Path("/proc/self/status"))
    if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return max(int(found[1]) * 1024, resident())  # the kernel updates the mark a little late
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak if sys.platform == "darwin" else peak * 1024
    )  # getrusage(2): bytes on macOS, kilobytes on Linux


def reset_peak_resident() -> bool:
    """Start `peak_resident` again from now.

    Returns:
        False where the kernel does not let a process do so (all but Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _address_space() -> list[DeviceMemory]:
    """The bound of `ulimit -v`, which counts virtual memory: a process has used much of it before
    it loads anything.
    """
    if sys.platform == "win32":
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    return [
        DeviceMemory(
            limit, limit - psutil.Process().memory_info().vms, f"ulimit -v ({limit / 1e9:.1f} GB)"
        )
    ]


def _cgroups(root: Path) -> Iterator[DeviceMemory]:
    """The bound of each cgroup that this process is in, its ancestors' included, as far up as they
    are mounted.
    """
    for mount, names in _memory_controllers(root):
        path = _path_below(mount, root, names)
        for group in (path, *path.parents):
            if bound := _bound(root / mount.mount_point.relative_to("/") / group, group, names):
                yield bound


@dataclass(frozen=True)
class _Names:
    """The files of one cgroup version."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[
        str, ...
    ]  # the lines of memory.stat for page cache, which the kernel drops before it kills


_V1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)

_V2 = _Names(
    ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
)  # above `high` a process is throttled


@dataclass(frozen=True)
class _Mount:
    """A mounted cgroup hierarchy: the cgroup that is mounted, and where."""

    top: PurePosixPath
    mount_point: PurePosixPath


def _memory_controllers(root: Path) -> Iterator[tuple[_Mount, _Names]]:
    """The mounted hierarchies that may have a memory controller, by /proc/self/mountinfo
    (proc_pid_mountinfo(5)).
    """
    line = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$", re.MULTILINE)
    for top, mount_point, file_system, options in line.findall(_text(root / "proc/self/mountinfo")):
        mount = _Mount(PurePosixPath(_unescaped(top)), PurePosixPath(_unescaped(mount_point)))
        if file_system == "cgroup2":
            yield mount, _V2
        elif "memory" in options.split(","):
            yield mount, _V1


def _path_below(mount: _Mount, root: Path, names: _Names) -> PurePosixPath:
    """This process's cgroup in a hierarchy, relative to its mount point.

    A container may see its own cgroup alone, mounted as the whole; /proc/self/cgroup then has the
    path of the host, or one that leads out of the container, and the mount point itself is the
    cgroup.
    """
    line = re.compile(r"^\d+:([^:]*):(/.*)$", re.MULTILINE)
    for controllers, path in line.findall(_text(root / "proc/self/cgroup")):
        if (controllers == "") if names is _V2 else ("memory" in controllers.split(",")):
            group = PurePosixPath(path)
            if group.is_relative_to(mount.top) and ".." not in group.parts:
                return group.relative_to(mount.top)
    return PurePosixPath()


def _bound(folder: Path, group: PurePosixPath, names: _Names) -> DeviceMemory | None:
    limits = [
        int(text) for name in names.limits if (text := _text(folder / name).strip()).isdigit()
    ]
    usage = _text(folder / names.usage).strip()
    if (
        not limits or not usage.isdigit()
    ):  # no limit ("max"), the root of v2, or no memory controller here
        return None
    lines = re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    used = max(
        int(usage) - sum(int(nbytes) for name, nbytes in lines if name in names.reclaimable), 0
    )
    limit = min(limits)
    return DeviceMemory(
        limit, limit - used, f"the cgroup {PurePosixPath('/') / group} ({limit / 1e9:.1f} GB)"
    )


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


_VARIABLE = "GLIBC_TUNABLES"

TUNABLES = {
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
    "glibc.malloc.mmap_threshold": 32 << 20,  # the most that glibc takes
    "glibc.malloc.trim_threshold": 1 << 30,
}


def reuse_freed_blocks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set glibc's `TUNABLES` for all processes of an environment; what the user has set stays.

    Args:
        environment: which is changed.
    """
    own = [setting for setting in environment.get(_VARIABLE, "").split(":") if setting]
    names = {setting.partition("=")[0] for setting in own}
    ours = [f"{name}={value}" for name, value in TUNABLES.items() if name not in names]
    environment[_VARIABLE] = ":".join(own + ours)


def release_free_heap() -> None:
    """Give what is free in this process's heap back to the system, so that growth from here on is
    counted whole.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
