"""Two weaknesses of Snakemake's Slurm executors while the controller is away, and their remedies.

Status: while `scontrol` does not answer, the executor asks `sacct` instead of `squeue`, whatever
its profile sets. Where Slurm has no accounting that fails until all attempts are used up; then the
executor loses sight of all jobs and waits for ever.

Steps: a job runs its work by `srun`, which gives up after 9 s without a controller ("Unable to
confirm allocation"). A job that starts while the controller is away fails by that alone.
"""

import shutil
import subprocess
import sys
import time
from typing import Any

_PATIENCE = 10  # seconds: without accounting some versions of sacct do not answer at all

_WAIT_FOR_CONTROLLER = 600  # seconds, then srun may try

_SECONDS_BETWEEN_PINGS = 1.0


def keep_to_squeue() -> bool:
    """Have the executor ask `squeue` alone, if it is loaded and `sacct` knows nothing.

    Returns:
        Whether that was done.
    """
    executor: Any = sys.modules.get("snakemake_executor_plugin_slurm")
    if executor is None or shutil.which("sacct") is None or _has_accounts():
        return False
    available = executor.is_query_tool_available
    executor.is_query_tool_available = lambda tool: tool != "sacct" and available(tool)
    return True


def wait_before_steps() -> bool:
    """Have a job wait for the controller before it calls `srun`, if Slurm runs this process.

    Returns:
        Whether that was done.
    """
    plugin: Any = sys.modules.get("snakemake_executor_plugin_slurm_jobstep")
    if plugin is None or shutil.which("scontrol") is None:
        return False
    run_job = plugin.Executor.run_job

    def run_when_it_answers(executor: Any, job: Any) -> None:
        wait_for_controller()
        run_job(executor, job)

    plugin.Executor.run_job = run_when_it_answers
    return True


def wait_for_controller(seconds: float = _WAIT_FOR_CONTROLLER) -> bool:
    """Wait until a controller answers, primary or backup.

    Args:
        seconds: How long at most.

    Returns:
        Whether one answered in time.
    """
    end = time.monotonic() + seconds
    while not _answers():
        if time.monotonic() > end:
            return False
        time.sleep(_SECONDS_BETWEEN_PINGS)
    return True


def _answers() -> bool:
    ping = ["scontrol", "ping"]
    try:
        done = subprocess.run(ping, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return " is UP" in done.stdout


def _has_accounts() -> bool:
    sacct = ["sacct", "-X", "-n"]
    try:
        return subprocess.run(sacct, capture_output=True, timeout=_PATIENCE).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
