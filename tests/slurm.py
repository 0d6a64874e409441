"""A real Slurm on this machine's loopback, for tests: one node with pretend GPUs, started and
stopped by its fixture.

Needs root and Debian's packages, which are installed where apt has them. What is started here is
stopped by its own process id, and what lay in /etc/slurm before is put back.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
ETC = Path(
    "/etc/slurm"
)  # a job step forgets SLURM_CONF, so that only the place that was compiled in will do
GPUS = 4


class SlurmUnavailableError(Exception):
    """Why there can be no Slurm here."""


def install() -> None:
    """Have Slurm's programs here. Raises SlurmUnavailableError."""
    if os.geteuid() != 0:
        raise SlurmUnavailableError("Slurm's daemons are started as root, and this is not")
    if missing := install_packages(["slurmctld", "slurmd", "sbatch", "munged"], PACKAGES):
        raise SlurmUnavailableError(missing)


def install_packages(programs: Sequence[str], packages: Sequence[str]) -> str:
    """Install Debian packages where their programs are not here yet; returns why that cannot be
    done, "" if it is.
    """
    if all(shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") for program in programs):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        names = ", ".join(packages)
        return f"{names} are not installed, and there is no apt-get, or no right, to use it"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with FileLock("/tmp/theloom-tests-apt.lock"):  # apt-get does not wait for another one
        for words in (
            ["update", "-qq"],
            ["install", "-qq", "-y", "--no-install-recommends", *packages],
        ):
            done = subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=3000
            )
    return f"apt-get cannot install them: {done.stderr.strip()[-200:]}" if done.returncode else ""


@dataclass
class Slurm:
    """A running controller and node. Job numbers are Slurm's."""

    folder: Path
    daemons: dict[str, subprocess.Popen]

    def start(self, name: str) -> None:
        """Start one of munged, slurmctld, slurmd in the foreground, as a child of this process."""
        commands = {
            "munged": ["munged", "--foreground", "--force", *self._munge_options()],
            "slurmctld": ["slurmctld", "-D", "-f", str(ETC / "slurm.conf")],
            "slurmd": ["slurmd", "-D", "-f", str(ETC / "slurm.conf"), "-N", node_name()],
        }
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [
                    shutil.which(commands[name][0], path=path) or commands[name][0],
                    *commands[name][1:],
                ],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
                start_new_session=True,
            )

    def _munge_options(self) -> list[str]:
        return [
            f"--key-file={self.folder}/munge.key",
            f"--log-file={self.folder}/munged.log",
            f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munged.seed",
            f"--socket={self.folder}/munge.socket",
        ]

    def stop(self, name: str) -> None:
        process = self.daemons.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.stdout

    def jobs(self) -> list[str]:
        """The numbers of all jobs that wait or run."""
        return self.ask("squeue", "--noheader", "--format", "%i").split()

    def records(self) -> list[dict[str, str]]:
        """What the controller knows of all jobs, finished ones included."""
        records = []
        for line in self.ask("scontrol", "--oneliner", "show", "job", "--details").splitlines():
            if "JobId=" in line:
                records.append(
                    dict(word.partition("=")[::2] for word in line.split() if "=" in word)
                )
        return records

    def wait_until_ready(self, seconds: float = 180) -> None:
        """Wait until the controller answers and has the node, with or without jobs on it."""
        states = {"idle", "mixed", "allocated"}
        state = ["sinfo", "--noheader", "--format", "%T"]
        wait_for(lambda: states & set(self.ask(*state).split()), seconds, self.folder)


def wait_for(condition, seconds: float, what: object = "") -> None:
    """Ask a condition ten times a second until it holds; AssertionError where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def node_name() -> str:
    return socket.gethostname().split(".")[0]


def start(folder: Path, cpus: int = 16, memory_seconds: int = 1) -> Slurm:
    """Write the config of a cluster of one node, which claims so many CPUs, into a folder and start
    it. The memory of a job is looked at once in so many seconds: each time over all processes of
    the machine. Raises SlurmUnavailableError.
    """
    folder.chmod(0o755)
    for parent in (
        folder.parents
    ):  # the daemons' sockets lie below it, and munge wants to trust the way there
        if (
            parent != Path("/")
            and parent.stat().st_mode & 0o022
            and not parent.stat().st_mode & 0o1000
        ):
            raise SlurmUnavailableError(f"{parent} can be written by others")
    for name in ("spool", "state", "devices"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    devices = []
    for number in range(GPUS):
        device = folder / "devices" / f"gpu{number}"
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))  # another name for /dev/null
        devices.append(device)
    files = {
        "slurm.conf": _slurm_conf(folder, cpus, memory_seconds),
        "gres.conf": "AutoDetect=off\n"
        f"Name=gpu Type=a100 File={folder}/devices/gpu[0-{GPUS - 1}]\n",
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    }
    ETC.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        place = ETC / name
        if place.is_symlink() or place.exists():
            place.rename(folder / f"{name}.before")
        place.symlink_to(folder / name)
    slurm = Slurm(folder, {})
    try:
        slurm.start("munged")
        wait_for(lambda: (folder / "munge.socket").exists(), 60, "munged")
        for daemon in ("slurmctld", "slurmd"):
            slurm.start(daemon)
        slurm.wait_until_ready()
    except AssertionError as error:
        output = "".join(file.read_text(errors="replace")[-2000:] for file in folder.glob("*.out"))
        stop(slurm)
        raise SlurmUnavailableError(f"{error}: {output}") from None
    return slurm


def stop(slurm: Slurm) -> None:
    """End all jobs and daemons of this Slurm, and put /etc/slurm back."""
    if "slurmctld" in slurm.daemons and (jobs := slurm.jobs()):
        slurm.ask("scancel", *jobs)
        wait_for(lambda: not slurm.jobs(), 300, "jobs to end")
    for name in ("slurmd", "slurmctld", "munged"):
        if name in slurm.daemons:
            slurm.stop(name)
    for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
        (ETC / name).unlink(missing_ok=True)
        if (before := slurm.folder / f"{name}.before").is_symlink() or before.exists():
            before.rename(ETC / name)


def _slurm_conf(folder: Path, cpus: int, memory_seconds: int) -> str:
    settings = {
        "ClusterName": "loom",
        "SlurmctldHost": f"{node_name()}(127.0.0.1)",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "CredType": "cred/munge",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SchedulerParameters": "sched_interval=2,batch_sched_delay=0",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        # the node may claim to have more than the machine
        "SlurmdParameters": "config_overrides",
        "ReturnToService": "2",
        "MinJobAge": "3600",
        "KillWait": "3",
        "JobRequeue": "0",
        # a job with more memory than it requested is killed
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": f"task={memory_seconds}",
        "JobAcctGatherParams": "OverMemoryKill",
        "AccountingStorageType": "accounting_storage/none",
        "GresTypes": "gpu",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    has = f"CPUs={cpus} RealMemory={4000 * cpus} Gres=gpu:a100:{GPUS}"
    lines.append(f"NodeName={node_name()} NodeAddr=127.0.0.1 {has} State=UNKNOWN")
    lines.append(
        f"PartitionName=gpu Nodes={node_name()} Default=YES DefMemPerCPU=500 "
        "MaxTime=INFINITE State=UP"
    )
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
