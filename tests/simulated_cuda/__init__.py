"""A simulated CUDA: streams, events, memory and devices over CPU tensors, in any order that a real
GPU may take.

What forgets to wait reads NaN, or what was there before, repeatably, on a machine without a GPU:

    with simulated(devices=2, policy="random", seed=3) as world:
        x = torch.ones(3, device="cuda:1") + 1      # queued
        assert x.cpu().tolist() == [2, 2, 2]         # waits
    world.schedule.syncs                             # how often the host waited, by cause

Not simulated: kernels and their speed, cuBLAS and its workspace, graphs, several processes, NCCL.
A kernel's own temporaries take no simulated memory. Autograd through such tensors is not supported.
"""

from simulated_cuda.interface import World, simulated, uuid
from simulated_cuda.streams import POLICIES

__all__ = ["POLICIES", "World", "simulated", "uuid"]
