"""The host's memory: the machine's, a cgroup's, `ulimit -v`; on files as the kernel writes them,
and on real ones.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support import touch
from theloom.devices import host

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
35 31 0:32 {top} {mount} rw,nosuid,relatime shared:11 - cgroup cgroup rw,memory
"""
V2_MOUNTS = (
    "29 23 0:26 {top} {mount} rw,nosuid,nodev shared:4 - cgroup2 cgroup2 "
    "rw,nsdelegate,memory_recursiveprot\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file tree: the mounts, this process's cgroups, and the files of some cgroups."""

    def write(mounts: str, cgroups: str, groups: dict[str, dict[str, str]]) -> Path:
        files = {"proc/self/mountinfo": mounts, "proc/self/cgroup": cgroups}
        files |= {
            f"sys/fs/cgroup/{group}/{name}": text
            for group, own in groups.items()
            for name, text in own.items()
        }
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def v1(limit: int, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": "inactive_file 7\n"
        f"total_inactive_file {cache - cache // 3}\ntotal_active_file {cache // 3}\n",
    }


def v2(limit: int | str, usage: int, cache: int = 0, high: int | str = "max") -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": f"anon 5\ninactive_file {cache - cache // 3}\nactive_file {cache // 3}\n",
    }


def test_the_machine_s_memory_where_nothing_limits_it(tmp_path):
    memory = host.memory(tmp_path)
    assert memory.total == psutil.virtual_memory().total
    assert memory.free == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    assert memory.used == memory.total - memory.free
    assert memory.limited_by == ""


def test_cgroup_v1(tree):
    mounts = V1_MOUNTS.format(top="/", mount="/sys/fs/cgroup/memory")
    root = tree(
        mounts,
        "4:memory:/job\n3:cpu:/other\n0::/\n",
        {"memory/job": v1(3_000_000, 2_000_000, 500_000)},
    )
    assert host.memory(root) == host.DeviceMemory(3_000_000, 1_500_000, "the cgroup /job (0.0 GB)")


def test_cgroup_v1_mounted_with_other_controllers(tree):
    mounts = V1_MOUNTS.format(top="/", mount="/sys/fs/cgroup/cpu,memory").replace(
        "rw,memory", "rw,cpu,memory"
    )
    root = tree(mounts, "4:cpu,memory:/job\n", {"cpu,memory/job": v1(3_000_000, 1_000_000)})
    assert host.memory(root).free == 2_000_000


def test_cgroup_v2(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    root = tree(
        mounts,
        "0::/user.slice/a b.scope\n",
        {"user.slice/a b.scope": v2(2_100_000_000, 500_000_000)},
    )
    memory = host.memory(root)
    assert memory == host.DeviceMemory(
        2_100_000_000, 1_600_000_000, "the cgroup /user.slice/a b.scope (2.1 GB)"
    )


def test_a_cgroup_is_throttled_from_high_on(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    root = tree(mounts, "0::/a\n", {"a": v2("max", 100_000, high=1_000_000)})
    assert (host.memory(root).total, host.memory(root).free) == (1_000_000, 900_000)


def test_ancestors_count_up_to_the_mount(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    groups = {
        "a/b": v2("max", 100_000),
        "a": v2(1_000_000, 900_000),
        ".": {"memory.stat": "anon 1\n"},
    }
    memory = host.memory(tree(mounts, "0::/a/b\n", groups))
    assert memory == host.DeviceMemory(1_000_000, 100_000, "the cgroup /a (0.0 GB)")


def test_the_least_of_total_and_free_may_come_from_two_cgroups(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    groups = {"a/b": v2(1_000_000, 100_000), "a": v2(5_000_000, 4_500_000)}
    memory = host.memory(tree(mounts, "0::/a/b\n", groups))
    assert memory == host.DeviceMemory(1_000_000, 500_000, "the cgroup /a (0.0 GB)")


def test_page_cache_that_can_be_dropped_is_free(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    assert (
        host.memory(tree(mounts, "0::/a\n", {"a": v2(1_000_000, 990_000, 900_000)})).free == 910_000
    )


def test_a_cgroup_over_its_limit_has_nothing_free(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup")
    assert host.memory(tree(mounts, "0::/a\n", {"a": v2(1_000_000, 1_200_000)})).free == 0


@pytest.mark.parametrize("path", ["/docker/1f", "/../../elsewhere", "/"])
def test_a_container_that_sees_its_own_cgroup_as_the_whole(tree, path):
    mounts = V2_MOUNTS.format(top="/docker/1f", mount="/sys/fs/cgroup")
    root = tree(mounts, f"0::{path}\n", {".": v2(1_000_000, 300_000)})
    assert host.memory(root) == host.DeviceMemory(1_000_000, 700_000, "the cgroup / (0.0 GB)")


def test_a_mount_point_with_a_space(tree):
    mounts = V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup/with\\040space")
    assert host.memory(tree(mounts, "0::/\n", {"with space": v2(1_000_000, 0)})).total == 1_000_000


def test_both_versions_at_once(tree):
    mounts = V1_MOUNTS.format(top="/", mount="/sys/fs/cgroup/memory")
    mounts += V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup/unified")
    groups = {"memory/job": v1(3_000_000, 1_000_000), "unified/job": {"cgroup.procs": "1\n"}}
    assert (
        host.memory(tree(mounts, "4:memory:/job\n0::/job\n", groups)).limited_by
        == "the cgroup /job (0.0 GB)"
    )


@pytest.mark.parametrize("unlimited", [v1(2**63 - 4096, 10**9), v2("max", 10**9)])
def test_a_cgroup_without_a_limit_says_nothing(tree, unlimited):
    mounts = V1_MOUNTS.format(top="/", mount="/sys/fs/cgroup/memory")
    mounts += V2_MOUNTS.format(top="/", mount="/sys/fs/cgroup/unified")
    root = tree(
        mounts, "4:memory:/job\n0::/job\n", {"memory/job": unlimited, "unified/job": unlimited}
    )
    assert host.memory(root).limited_by == ""
    assert host.memory(root).total == psutil.virtual_memory().total


def test_files_that_are_not_as_expected_say_nothing(tree):
    root = tree("rubbish\n1 2 3 - cgroup2\n", "0\n::\n", {".": v2("?", 1)})
    assert host.memory(root).limited_by == ""


REPORT = """
import sys
from theloom.devices import host
{before}
memory = host.memory()
print(memory.total, memory.free, memory.limited_by)
"""


def report(before: str, start: Callable[[], None] | None = None) -> tuple[int, int, str]:
    """What a new process, which first does `before`, says of its memory."""
    source = REPORT.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, preexec_fn=start, check=True
    )
    total, free, limited_by = done.stdout.strip().split(" ", 2)
    return int(total), int(free), limited_by


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_a_real_ulimit():
    import resource

    limit = 4_000_000_000
    total, free, limited_by = report(
        "held = bytearray(500_000_000)",
        lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert (total, limited_by) == (limit, "ulimit -v (4.0 GB)")
    assert limit - 2_500_000_000 < free < limit - 500_000_000


def memory_hierarchy() -> tuple[Path, str, str] | None:
    """The top of the mounted hierarchy with a memory controller, and the names of its limit and
    usage.
    """
    for mount, names in host._memory_controllers(host.ROOT):
        top = Path(mount.mount_point)
        if names is host._V1 or "memory" in host._text(top / "cgroup.subtree_control").split():
            return top, names.limits[0], names.usage
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A real cgroup with a limit of 400 MB, and an inner one without, for processes."""
    if sys.platform != "linux":
        pytest.skip("cgroups are Linux's")
    found = memory_hierarchy()
    if found is None:
        pytest.skip("no memory controller is mounted")
    top, limit, _ = found
    outer = top / f"theloom-test-{os.getpid()}"
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / limit).write_text("400000000")
        if (outer / "cgroup.subtree_control").exists():
            (outer / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        for folder in (outer / "inner", outer):
            if folder.exists():
                folder.rmdir()
        pytest.skip(f"no cgroup can be made here: {error.strerror}")
    yield outer / "inner"
    (outer / "inner").rmdir()
    outer.rmdir()


def test_a_real_cgroup(cgroup, tmp_path):
    """The limit is found on an ancestor, what is held is used, and the page cache of a file that
    was read is free.
    """
    enter = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"
    total, free, limited_by = report(enter)
    assert total == pytest.approx(400_000_000, abs=4096)
    assert free > 300_000_000
    assert limited_by == f"the cgroup /{cgroup.parent.name} (0.4 GB)"

    _, less, _ = report(f"{enter}\nheld = b'x' * 150_000_000")
    assert 130_000_000 < free - less < 170_000_000

    file = tmp_path / "file"
    cached = (
        f"open({str(file)!r}, 'wb').write(b'x' * 1_000); import os; os.truncate({str(file)!r}, "
        "200_000_000)"
    )
    cached += f"\nf = open({str(file)!r}, 'rb')\nwhile f.read(1 << 20): pass"
    _, with_cache, _ = report(f"{enter}\n{cached}")
    assert free - with_cache < 50_000_000


def test_what_is_free_in_a_real_cgroup_can_be_held_and_more_cannot(cgroup):
    enter = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"
    hold = "free = host.memory().free; held = b'x' * int(free * {share})"
    assert report(f"{enter}\n{hold.format(share=0.9)}")[2]
    with pytest.raises(subprocess.CalledProcessError) as killed:
        report(f"{enter}\n{hold.format(share=1.3)}")
    assert killed.value.returncode == -9


def test_peak_resident_memory_sees_what_was_freed_again():
    if not host.reset_peak_resident():
        pytest.skip("this kernel does not let a process reset its peak")
    before = host.resident()
    touch(64 << 20)
    assert 60 << 20 < host.peak_resident() - before < 90 << 20
    host.reset_peak_resident()
    assert host.peak_resident() - host.resident() < 30 << 20
