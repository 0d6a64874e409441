"""The KV cache that long documents stream through: transformers' own, without what its windows no longer see."""

from typing import Any

from transformers import DynamicCache


class PrefillCache(DynamicCache):
    """A DynamicCache whose sliding-window layers hold their window alone.

    Theirs is a view of window and chunk together, which keeps the whole alive: a prefill's first chunk, however long,
    would stay on the device until the next one. Here a layer's window is a tensor of its own.
    """

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if held is not None and held.untyped_storage().nbytes() > held.nbytes:
                setattr(layer, name, held.clone())
        return updated
