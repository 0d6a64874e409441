"""Numbers of PyTorch's CUDA caching allocator, and what a process takes beside its tensors.

`caching_allocator` replays its rules.
"""

Event = tuple[int, int]  # of LiveStorages: the number of a storage, its bytes; negative at its end

Capability = tuple[int, int] | None  # a compute capability; None: not known, or no NVIDIA GPU

KIB, MIB = 1 << 10, 1 << 20

# c10/core/AllocatorConfig.h
ROUNDING = 512  # every block is a multiple of this
SMALL = MIB  # the largest request that the small pool serves
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # of requests under LARGEST_SHARED; larger ones get a segment of their own
LARGEST_SHARED = 10 * MIB
SEGMENT_ROUNDING = 2 * MIB

# Bytes that a process takes on a GPU before its first tensor: the CUDA context and the loaded
# kernels. An approximation: 0.3e9 to 0.6e9, by driver, GPU and libraries. No allocator counts it,
# NVML does.
CUDA_CONTEXT = 500_000_000


def cublas_workspace(capability: Capability) -> int:
    """Bytes that torch allocates at the first matrix product, for as long as the process lives.

    `capability` is the compute capability, such as (8, 0); None: the most of all. The default of
    ATen/cuda/CublasHandlePool.cpp in torch 2.13, which the environment variable
    CUBLAS_WORKSPACE_CONFIG overrides; cuBLASLt shares it.
    """
    return (
        32 * MIB
        if capability is None or capability[0] in (9, 10, 12)
        else 2 * 4096 * KIB + 8 * 16 * KIB
    )
