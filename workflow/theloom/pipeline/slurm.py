"""Slurm without accounting, and a controller that is away: what Snakemake's executor makes of both
together.

While `scontrol` does not answer, the executor asks `sacct` in place of `squeue`, whatever its
profile says. Where Slurm keeps no accounts that fails until its attempts are used up; then it loses
sight of all jobs, and waits for ever.
"""

import shutil
import subprocess
import sys
from typing import Any

_PATIENCE = 10  # seconds: without accounts some versions of sacct do not answer at all


def keep_to_squeue() -> bool:
    """Have the executor ask `squeue` alone, if it is loaded and `sacct` knows nothing; whether that
    was done.
    """
    executor: Any = sys.modules.get("snakemake_executor_plugin_slurm")
    if executor is None or shutil.which("sacct") is None or _has_accounts():
        return False
    available = executor.is_query_tool_available
    executor.is_query_tool_available = lambda tool: tool != "sacct" and available(tool)
    return True


def _has_accounts() -> bool:
    try:
        return (
            subprocess.run(["sacct", "-X", "-n"], capture_output=True, timeout=_PATIENCE).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
