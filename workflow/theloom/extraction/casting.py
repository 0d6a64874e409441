"""A model run in another precision than the one its weights are in, without a second copy of it."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from theloom.errors import ModelError
from theloom.hooks.blocks import Architecture


class InPrecision:
    """While the context is open, forward passes run as if the model had been loaded in `dtype`.

    What lies outside of the blocks, but for the LM head, is there in that precision as well all the
    time, and the block that is running while it runs: that is the memory it takes. Parameters are
    put back as the same objects. Weights that transformers keeps in FP32 at 16 bits stay so. Raises
    ModelError for quantised weights.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        self._model, self._dtype = architecture.model, dtype
        self._blocks = list(dict.fromkeys(architecture.called))  # a module may be several
        if (
            getattr(self._model, "is_quantized", False)
            or getattr(self._model, "hf_quantizer", None) is not None
        ):
            raise ModelError(
                "precision: the weights of this model are quantised; leave precision out"
            )
        self._stay = _kept_in_fp32(self._model, dtype)
        self._outside: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._inside: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "InPrecision":
        within = {module for block in self._blocks for module in block.modules()}
        head = self._model.get_output_embeddings()
        try:
            self._cast(
                (m for m in self._model.modules() if m not in within and m is not head),
                self._outside,
            )
            for block in self._blocks:
                self._handles.append(block.register_forward_pre_hook(self._before, prepend=True))
                self._handles.append(block.register_forward_hook(self._after))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _put_back(self._inside)
        _put_back(self._outside)

    def _before(self, block: nn.Module, args: Any) -> None:
        _put_back(self._inside)
        self._cast(block.modules(), self._inside)

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        _put_back(self._inside)

    def _cast(
        self, modules: Iterable[nn.Module], kept: list[tuple[dict[str, Any], str, torch.Tensor]]
    ) -> None:
        cast: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for module in modules:
            persistent = {
                n: b
                for n, b in module._buffers.items()
                if n not in module._non_persistent_buffers_set
            }
            homes: list[tuple[dict[str, Any], dict[str, Any]]] = [
                (module._parameters, dict(module._parameters)),
                (module._buffers, persistent),
            ]
            for home, tensors in homes:
                for name, tensor in tensors.items():
                    if (
                        tensor is None
                        or not tensor.is_floating_point()
                        or tensor.dtype == self._dtype
                    ):
                        continue
                    kept.append((home, name, tensor))
                    if id(tensor) not in cast:
                        dtype = torch.float32 if id(tensor) in self._stay else self._dtype
                        converted = tensor.detach().to(dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        cast[id(tensor)] = (
                            nn.Parameter(converted, False) if is_parameter else converted
                        )
                    home[name] = cast[id(tensor)]


def _put_back(kept: list[tuple[dict[str, Any], str, torch.Tensor]]) -> None:
    while kept:
        home, name, tensor = kept.pop()
        home[name] = tensor


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> set[int]:
    """Identities of the weights that transformers loads in FP32 where this dtype is requested."""
    names = set(model._keep_in_fp32_modules_strict or []) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or [])
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(t) for name, t in named if any(re.search(rf"(^|\.){n}(\.|$)", name) for n in names)}
