"""The steps of `make gpu`: each takes a folder of its own and gives rows of figures, or is skipped
with a reason. A row that says `right: False` makes its step wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_llama
import gpu_parts
import gpu_runs
from gpu_machine import Rows


class Step(NamedTuple):
    """What runs, and for how many seconds at most."""

    function: Callable[[Path], Rows]
    seconds: int


STEPS = {
    "versions": Step(gpu_parts.versions, 25),
    "tests": Step(gpu_runs.tests, 100),
    "pipeline": Step(gpu_runs.pipeline, 80),
    "attention": Step(gpu_parts.attention, 40),
    "pinning": Step(gpu_parts.pinning, 30),
    "arithmetic": Step(gpu_parts.arithmetic, 20),
    "llama": Step(gpu_llama.llama, 80),
    "back-off": Step(gpu_runs.back_off, 40),
    "layer by layer": Step(gpu_runs.layer_by_layer, 40),
    "disk": Step(gpu_parts.disk, 20),
    "quantised": Step(gpu_runs.quantised, 50),
    "several GPUs": Step(gpu_llama.several_gpus, 40),
    "sanitizer": Step(gpu_runs.sanitizer, 35),
}
