"""A pass of three tokens, which shows how a model's modules run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from theloom.hooks.failures import refused
from theloom.hooks.pass_state import PassState


class BlockNotLoadedError(Exception):
    """A forward pass came to a block that is not loaded, since no hook point needs it: its end."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; every module's own mode is restored after that.

    Args:
        model: any module.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forward_three_tokens(model: nn.Module, **options: Any) -> Any:
    """Run a forward pass that leaves no trace in the model.

    Args:
        model: whole, or ending at a block that is not loaded.
        **options: further arguments of its forward.

    Returns:
        What the model gives; None where it ends at such a block.

    Raises:
        ModelError: its code raises.
    """
    some: Any = next(model.parameters())
    state = PassState(model)
    with torch.inference_mode(), evaluating(model), refused(cannot_run(model)):
        ids = torch.arange(3, device=getattr(model, "device", some.device))[None]
        try:
            return model(input_ids=ids, use_cache=False, **options)
        except BlockNotLoadedError:
            return None
        finally:
            state.restore()


def cannot_run(model: nn.Module) -> str:
    """The start of a message about a model that does not run, on values or without them.

    Args:
        model: real or fake.

    Returns:
        Words to which a reason is added.
    """
    if any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        return f"{type(model).__name__}: its memory cannot be predicted"
    return f"{type(model).__name__} cannot be run on token ids alone"
