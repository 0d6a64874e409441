"""What a process takes of a GPU beside its tensors."""

Capability = tuple[int, int] | None  # a compute capability; None: not known, or no NVIDIA GPU

# Bytes that a process takes on a GPU before its first tensor: the CUDA context and the loaded
# kernels. An approximation: 0.3e9 to 0.6e9, by driver, GPU and libraries. No allocator counts it,
# NVML does.
CUDA_CONTEXT = 500_000_000


def cublas_workspace(capability: Capability) -> int:
    """Give what torch allocates at the first matrix product, for as long as the process lives.

    The default of ATen/cuda/CublasHandlePool.cpp in torch 2.13, which the environment variable
    CUBLAS_WORKSPACE_CONFIG overrides; cuBLASLt shares it.

    Args:
        capability: compute capability; None: the most of all.

    Returns:
        Bytes.

    Examples:
        >>> cublas_workspace((9, 0)) // 2**20
        32
    """
    large = capability is None or capability[0] in (9, 10, 12)
    return 32 << 20 if large else (2 * 4096 + 8 * 16) << 10
