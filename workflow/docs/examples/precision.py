"""What a precision costs: the runs of a sweep against the one in FP32.

    make run SET="name=precision memory.precision_mode=fp32,bf16 corpus.max_tokens=2048"
    .venv/bin/python workflow/docs/examples/precision.py results/precision+*

`make report` with the same SET draws the same figures side by side.
"""

import sys
from pathlib import Path

from theloom.report.runs import Compared, compare


def main(folders: list[Path]) -> list[Compared]:
    """Errors as shares of FP32 rows, the measured memory, and the speed of every run."""
    runs = compare(folders)
    for run in runs:
        error = (
            "no FP32 run to compare with" if run.error_rms is None else f"error {run.error_rms:.2e}"
        )
        speed = (
            "not timed"
            if run.tokens_per_second is None
            else f"{run.tokens_per_second:,.0f} tokens/s"
        )
        memory = f"{run.memory / 1e6:,.0f} MB"
        print(f"{run.run}: {run.precision}, stored as {run.stored}: {error}, {memory}, {speed}")
    return runs


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
