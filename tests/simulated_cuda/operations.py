"""What kinds of operations there are, by their schemas."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

# composite operations that run as a whole, as they do on the CPU
WHOLE = {
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.linear.default,
    aten.embedding.default,
}
# results that the host must know: it waits
SYNCING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.equal.default,
    aten.allclose.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}


@functools.cache
def is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def is_view(func: Any) -> bool:
    returns = func._schema.returns
    return func is aten._unsafe_view.default or any(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


@functools.cache
def makes(func: Any) -> bool:
    """Whether the operation takes a device."""
    return any(a.name == "device" for a in func._schema.arguments)


FACTORIES = (
    "empty", "empty_strided", "zeros", "ones", "full", "arange", "eye", "linspace", "rand", "randn",
    "randint", "scalar_tensor", "tril_indices", "triu_indices", "empty_like", "zeros_like",
    "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_empty_strided",
    "new_zeros", "new_ones", "new_full",
)  # fmt: skip


@functools.cache
def written(func: Any) -> Callable[[Any, Any], Any] | None:
    """How to find, among the arguments, what an in-place operation returns; None for others."""
    writes = [
        (number, a)
        for number, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if not writes:
        return None
    if not func._schema.returns:
        return lambda args, kwargs: None

    def find(args: Any, kwargs: Any) -> Any:
        found = [kwargs[a.name] if a.kwarg_only else args[n] for n, a in writes]
        return found[0] if len(func._schema.returns) == 1 else tuple(found)

    return find


def has_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether tensors are indexed by a mask, whose ones the host must count."""
    return func is aten.index.Tensor and any(
        i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    )


def shaped_by_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation of bitsandbytes gives as many columns as have outliers, which the host
    must know: where a threshold of them is given, and in the product that follows.
    """
    name = func._schema.name
    if name == "bitsandbytes::int8_vectorwise_quant":
        return any(isinstance(x, float) and x > 0 for x in (*args, *kwargs.values()))
    return bool(name == "bitsandbytes::int8_mixed_scaled_mm")
