"""What this machine's GPU drivers say: NVIDIA's, or where that shows no GPU AMD's."""

from theloom.devices import amd, nvml
from theloom.devices.nvml import Machine


def read() -> Machine:
    """Ask the drivers. Makes no context on a GPU, and never raises.

    Returns:
        NVIDIA's GPUs, else AMD's, or why there are none.
    """
    found = nvml.read()
    if found.devices:
        return found
    others = amd.read()
    return others if others.devices else found
