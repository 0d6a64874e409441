"""Which tensors go into and out of a model's modules, in a forward pass of three tokens."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from theloom.hooks import attention
from theloom.hooks.attention import ROT_K, ROT_Q, Inside
from theloom.hooks.blocks import Architecture
from theloom.hooks.layouts.trial import forward_three_tokens
from theloom.hooks.module_names import find_attention, find_core
from theloom.hooks.sites import Norm, Site, is_norm
from theloom.rows.modality import senses


class Flow:
    """Which tensors went into and out of a model's modules, in a pass of three tokens."""

    def __init__(self, architecture: Architecture) -> None:
        model = architecture.model
        self._blocks = {m: block for block in architecture.blocks for m in block.modules()}
        self._in: dict[nn.Module, torch.Tensor] = {}
        self._out: dict[nn.Module, torch.Tensor] = {}
        # of modules that give several values: each of them, None for what is no tensor
        self.several: dict[nn.Module, list[torch.Tensor | None]] = {}
        self.ran: list[nn.Module] = []
        # what dropout was given, by what it made of it: without values it is another storage
        self._dropped: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.heads: dict[nn.Module, tuple[int, int]] = {}
        self.head_size: dict[nn.Module, int] = {}
        self.last_state = 0  # the identity of what the model gives as its last hidden state
        with ExitStack() as opened:
            for module in model.modules():
                if module is not model:
                    opened.callback(
                        module.register_forward_pre_hook(self._before, with_kwargs=True).remove
                    )
                    opened.callback(module.register_forward_hook(self._after).remove)
            for block in dict.fromkeys(architecture.blocks):  # a module may be several
                attn = find_attention(block)
                core = find_core(attn) if attn is not None else None
                if core is not None and attention.uses_registry(core):
                    opened.enter_context(Inside(core, {ROT_Q, ROT_K}, self._meet(core)))
            base = model if senses(model.config) else getattr(model, "base_model", model)
            opened.callback(base.register_forward_hook(self._end).remove)
            forward_three_tokens(model)
        self._norms = {m: Norm(m, self._in[m]) for m in self.ran if is_norm(m) and m in self._in}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self._in and any(
            isinstance(v, torch.Tensor) for v in (*args, *kwargs.values())
        ):
            self._in[module] = Site.input(args, kwargs)
        self.ran.append(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        values = output if isinstance(output, tuple | list) else [output]
        found = next((v for v in values if isinstance(v, torch.Tensor)), None)
        if isinstance(output, tuple | list) and len(output) > 1:
            tensors = [v if isinstance(v, torch.Tensor) else None for v in output]
            self.several.setdefault(module, tensors)
        if found is not None:
            self._out.setdefault(module, found)
        if found is not None and isinstance(module, nn.Dropout) and args:
            self._dropped.setdefault(_identity(found), (args[0], found))  # both stay alive

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is None and isinstance(output, tuple) and output:
            state = output[0]
        self.last_state = self._origin(state if isinstance(state, torch.Tensor) else None)

    def _origin(self, value: torch.Tensor | None) -> int:
        """The identity of a tensor before dropout, which changes nothing in eval mode."""
        found = _identity(value)
        while found in self._dropped and (before := _identity(self._dropped[found][0])) != found:
            found = before
        return found

    def _meet(self, core: nn.Module) -> Callable[[str, torch.Tensor], None]:
        def read(name: str, value: torch.Tensor) -> None:
            heads, kv_heads = self.heads.get(core, (0, 0))
            self.heads[core] = (
                (value.shape[2], kv_heads) if name == ROT_Q else (heads, value.shape[2])
            )
            if name == ROT_Q:
                self.head_size[core] = value.shape[3]

        return read

    def input(self, module: nn.Module | None) -> int:
        """Identify what a module was given first.

        Args:
            module: of the model; None counts as one that did not run.

        Returns:
            The identity of the tensor's storage; 0 if the module did not run.
        """
        return self._origin(self._in.get(module)) if module is not None else 0

    def output(self, module: nn.Module | None) -> int:
        """Identify what a module returned first.

        Args:
            module: of the model; None counts as one that did not run.

        Returns:
            The identity of the tensor's storage; 0 if the module did not run.
        """
        return self._origin(self._out.get(module)) if module is not None else 0

    def width_in(self, module: nn.Module | None) -> int:
        """The last axis of what a module was given first.

        Args:
            module: of the model.

        Returns:
            Elements; 0 if it did not run.
        """
        return self._in[module].shape[-1] if module in self._in else 0

    def width_out(self, module: nn.Module | None) -> int:
        """The last axis of what a module returned first.

        Args:
            module: of the model.

        Returns:
            Elements; 0 if it did not run.
        """
        return self._out[module].shape[-1] if module in self._out else 0

    def norm_to(self, value: int, block: nn.Module) -> Norm | None:
        """Find the norm of a block that a value comes from.

        Args:
            value: the identity of its storage.
            block: within which to look.

        Returns:
            The norm; None where there is none, or the value is 0.
        """
        norms = self._norms.items()
        return next(
            (n for m, n in norms if value and self.output(m) == value and self.inside(m, block)),
            None,
        )

    def norm_of(self, value: int, outside: bool = False) -> Norm | None:
        """Find the norm that takes a value.

        Args:
            value: the identity of its storage.
            outside: look outside of all blocks, instead of within them.

        Returns:
            The norm; None where there is none, or the value is 0.
        """
        return next(
            (
                n
                for m, n in self._norms.items()
                if value and self.input(m) == value and outside != self.in_a_block(m)
            ),
            None,
        )

    def in_a_block(self, module: nn.Module) -> bool:
        """Whether a module is within any block.

        Args:
            module: of the model.

        Returns:
            True for blocks and the modules within them.
        """
        return module in self._blocks

    def inside(self, module: nn.Module, block: nn.Module) -> bool:
        """Whether a module is within a block.

        Args:
            module: of the model.
            block: of the model.

        Returns:
            True for the block and the modules within it.
        """
        return self._blocks.get(module) is block


def _identity(value: torch.Tensor | None) -> int:
    return 0 if value is None else value.untyped_storage()._cdata
