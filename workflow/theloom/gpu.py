"""The memory of GPUs, for your own code: `GPUManager` and what it reports of each device,
`GPUInfo`.
"""

from theloom.devices.gpu import GPUInfo, GPUManager

__all__ = ["GPUInfo", "GPUManager"]
