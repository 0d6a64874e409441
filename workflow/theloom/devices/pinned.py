"""Page-locked ("pinned") memory of the host: what copies next to the computation need.

Pinned memory cannot be swapped out, and torch rounds each piece of it up to a power of two unless
it is told not to: 70 GB took 128 GiB. So it is counted as it is taken, bounded, and given up for
plain memory (slower copies, same values) where there is no room for it.
"""

import functools
import logging
import weakref
from typing import TYPE_CHECKING

from theloom.devices import accelerator, host
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PAGE = 4096
LARGEST_ROUNDED = 64 << 20  # bytes of a piece up to which torch rounds, so that pieces are reused
MOST = 0.6  # of the host's memory that may be pinned

_taken: dict[int, int] = {}


def pinned_bytes(nbytes: int) -> int:
    """Compute what a pinned piece really takes.

    Args:
        nbytes: of the piece.

    Returns:
        Bytes.

    Examples:
        >>> pinned_bytes(3000)
        4096
    """
    if nbytes > LARGEST_ROUNDED and _not_rounded():
        return -(-nbytes // PAGE) * PAGE
    return 0 if nbytes == 0 else max(PAGE, 1 << (nbytes - 1).bit_length())


def host_bytes(nbytes: int) -> int:
    """Compute what `pinned_empty` takes: as much as is asked for where it may not be pinned.

    Args:
        nbytes: of the piece.

    Returns:
        Bytes.
    """
    return pinned_bytes(nbytes) if may_pin(nbytes) else nbytes


def may_pin(nbytes: int) -> bool:
    """Tell whether this process may pin more of the host's memory.

    Args:
        nbytes: how much more.

    Returns:
        Whether it may.
    """
    return sum(_taken.values()) + pinned_bytes(nbytes) <= MOST * host.memory().total


def pinned_empty(count: int, dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """An uninitialised vector on the host from which, and to which, a device copies.

    Args:
        count: Elements.
        dtype: Of an element.
        device: The device that copies. Pinned memory is of use only to one with streams.

    Returns:
        The vector; pinned if the device has streams and there is room, else plain, with a warning.
    """
    import torch

    nbytes = count * dtype.itemsize
    if not accelerator.has_streams(device) or not count:
        return torch.empty(count, dtype=dtype)
    if may_pin(nbytes):
        _not_rounded()
        try:
            made = torch.empty(count, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
        else:
            _taken[id(made)] = pinned_bytes(nbytes)
            weakref.finalize(made, _taken.pop, id(made), None)
            return made
    log.warning(
        "%s of the host's memory cannot be pinned: copies will stop the computation",
        format_bytes(nbytes),
    )
    return torch.empty(count, dtype=dtype)


def pinned_copy(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a small tensor of the host so that a device with streams can copy it without a wait.

    Args:
        tensor: on the host.
        device: where it goes.

    Returns:
        The copy, pinned; for a device without streams the tensor itself.
    """
    return tensor.pin_memory() if accelerator.has_streams(device) else tensor


@functools.cache
def _not_rounded() -> bool:
    """Have torch take large pieces as they are; whether it does."""
    import torch

    own = f"pinned_max_round_threshold_mb:{LARGEST_ROUNDED >> 20}"
    try:
        before = torch._C._accelerator_getAllocatorSettings()
        if "pinned_max_round_threshold_mb" in before:
            return own in before
        torch._C._accelerator_setAllocatorSettings(f"{before},{own}" if before else own)
    except (AttributeError, RuntimeError, ValueError):  # torch before 2.12 always rounds
        return False
    return True
