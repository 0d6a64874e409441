"""What a model remembers from one forward pass to the next, outside of a KV cache.

A few classes of transformers keep a choice from an earlier pass (rotary frequencies of the longest
document so far, an attention type, offsets of positions), so a document's rows would depend on what
ran before it. `PassState` puts such attributes back before each pass.
"""

from typing import Any

import torch
from torch import nn

# layers of libraries that quantise or move weights keep their own books
_NOT_MODEL_CODE = ("torch.", "transformers.integrations.", "bitsandbytes.", "accelerate.")

_KEPT = (bool, int, float, str, type(None), torch.Tensor)


class PassState:
    """The plain attributes and buffers of a model's own modules, as they are now.

    Args:
        model: The model. Its weights, and the layers of torch in it, are not looked at.

    Examples:
        >>> class Counting(nn.Module):
        ...     longest = 0
        >>> module = Counting()
        >>> module.longest = 5
        >>> state = PassState(module)
        >>> module.longest = 99
        >>> state.restore()
        >>> module.longest
        5
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            m for m in model.modules() if not type(m).__module__.startswith(_NOT_MODEL_CODE)
        ]
        self._values: list[tuple[dict[str, Any], str, Any]] = []
        for module in self._modules:
            self._values += [(vars(module), name, value) for name, value in _plain(module)]
            self._values += [(module._buffers, n, value) for n, value in module._buffers.items()]
        self._sizes = [len(vars(module)) for module in self._modules]

    def restore(self) -> None:
        """Put back every attribute and buffer that was replaced since, and drop what was added."""
        for owner, name, value in self._values:
            if owner.get(name) is not value:
                owner[name] = value
        for module, size in zip(self._modules, self._sizes, strict=True):
            if len(vars(module)) > size:
                known = {name for owner, name, _ in self._values if owner is vars(module)}
                for name, _ in _plain(module):
                    if name not in known:
                        del vars(module)[name]


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, _KEPT)
    ]
