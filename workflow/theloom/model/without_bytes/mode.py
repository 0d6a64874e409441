"""Fake tensors whose shapes are all numbers, with results that are looked up quickly.

A forward pass without bytes is some hundred operations of microseconds each, so the time that
PyTorch's own `FakeTensorMode` takes to look up a result is the time of the pass. Which results may
be looked up is PyTorch's decision; how they are looked up and made is here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_UNSAFE_VIEW, _VIEW = torch.ops.aten._unsafe_view.default, torch.ops.aten.view.default
_T, _TRANSPOSE = torch.ops.aten.t.default, torch.ops.aten.transpose.int
_DEVICE = torch.ops.prim.device.default
_PLAIN: set[type] = {int, float, bool, str, type(None)}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}

# What asks a tensor about itself, by identity: an operation's own hash is Python code
_QUESTIONS = {
    *map(id, fake_tensor._DISPATCH_META_HANDLERS),
    *map(id, fake_tensor._DISPATCH_HANDLE_DIRECTLY),
}
# Results by what they follow from, of all modes of the process; None: computed each time
_RESULTS: dict[tuple[Any, ...], Any] = {}
_STATE = fake_tensor._CacheKeyState(None)  # without symbols it stays as it is
_NO_KEY = cast(Any, None)  # PyTorch reads symbols from it


class WithoutBytes(FakeTensorMode):
    """PyTorch's mode of fake tensors, without symbols; quicker at what it has seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs 10 µs an operation

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=None)
        one = FakeTensor(self, torch.empty(0, device="meta"), torch.device("cpu"))
        self._fields = dict(one.__dict__)  # of every tensor, but for its device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and not self.in_kernel_invocation:
            return args[0].fake_device
        # the same shape and storage, and looked up where the one that was asked for is not
        if func is _UNSAFE_VIEW:
            func = _VIEW
        elif func is _T and args[0].ndim == 2:
            func, args = _TRANSPOSE, (args[0], 0, 1)
        if id(func) in _QUESTIONS or not self.cache_enabled:
            return self.dispatch(func, types, args, kwargs or {})
        return self._cached_dispatch_impl(func, types, args, kwargs or {})

    def _cached_dispatch_impl(
        self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Look a result up, or compute it and keep it where PyTorch allows that."""
        parts: list[Any] = [
            id(func),
            torch.get_default_dtype(),
            torch._C._get_default_device(),
            torch.is_inference_mode_enabled(),
        ]
        if not (self._add(parts, args) and (not kwargs or self._add(parts, kwargs))):
            return self._dispatch_impl(func, types, args, kwargs)
        key = tuple(parts)
        entry = _RESULTS.get(key, self)
        if entry is self:
            output = self._dispatch_impl(func, types, args, kwargs)
            try:
                entry = self._make_cache_entry(_STATE, _NO_KEY, func, args, kwargs, output)
            except fake_tensor._BypassDispatchCache:
                entry = None
            _RESULTS[key] = entry
            return output
        if entry is None:
            return self._dispatch_impl(func, types, args, kwargs)
        return self._output_from_cache_entry(_STATE, entry, _NO_KEY, func, args)

    def _add(self, parts: list[Any], args: Any) -> bool:
        """Add what a result follows from; False where it follows from more than is seen here."""
        parts += (type(args), len(args))
        if isinstance(args, dict):
            parts += args
            args = tuple(args.values())
        for arg in args:
            kind = type(arg)
            if kind is FakeTensor:
                if arg.fake_mode is not self or arg.constant is not None:
                    return False
                if arg.layout is not torch.strided:
                    return False
                parts += (
                    arg.shape,
                    arg.stride(),
                    arg.storage_offset(),
                    arg.untyped_storage().nbytes(),
                    arg.dtype,
                    arg.fake_device,
                    arg.requires_grad,
                    arg.is_inference(),
                    arg.is_quantized,
                    arg.is_conj(),
                    arg.is_neg(),
                )
            elif kind in _PLAIN:
                parts += (kind, arg)
            elif kind in (list, tuple, dict):
                if not self._add(parts, arg):
                    return False
            else:
                return False
        return True

    def _get_output_tensor_from_cache_entry(
        self, state: Any, entry: Any, key: Any, func: Any, args: Sequence[Any]
    ) -> Any:
        """Make a result that was looked up: as PyTorch does, without what symbols would need."""
        if entry.inplace_idx is not None:
            return args[entry.inplace_idx]
        made = entry.metadata
        if made is None:
            return entry.constant_value
        if made.is_conj or made.is_neg:
            return super()._get_output_tensor_from_cache_entry(state, entry, key, func, args)
        shape, stride = made.shape, made.stride
        # a view of a weight is none of inference mode, as the weight is not
        with torch._C._DisableTorchDispatch(), torch._C._InferenceMode(made.is_inference):
            meta = torch.empty_strided(
                shape, stride, dtype=made.dtype, device="meta", requires_grad=made.requires_grad
            )
            if entry.view_idx is not None:
                storage = args[entry.view_idx].untyped_storage()
                meta.set_(storage, made.storage_offset, shape, stride)
            tensor: Any = torch.Tensor._make_subclass(
                FakeTensor,
                meta,
                made.requires_grad,
                dispatch_device=True,
                device_for_backend_keys=made.device,
            )
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.__dict__.update(self._fields, _fake_device=made.device)
        return tensor
