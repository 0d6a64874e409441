"""What runs the blocks over one batch: resident execution, with the model on the device as a whole."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from theloom.forward import prefill
from theloom.hooks import HookPoint
from theloom.model import LoadedModel
from theloom.precision import torch_dtype
from theloom.taps import Taps

if TYPE_CHECKING:
    import torch

# called with a hook point's name, the first position of a chunk, and its values (window, position, …) on the device;
# they are the model's own, which may change them after the call
Sink = Callable[[str, int, "torch.Tensor"], None]


class ResidentRunner:
    """Runs batches through a model that is on the device as a whole."""

    def __init__(
        self, loaded: LoadedModel, points: list[HookPoint], chunk_size: int, store: str, offloaded: bool = False
    ) -> None:
        self._loaded, self._points, self._chunk_size = loaded, points, chunk_size
        self._dtype, self._offloaded = torch_dtype(store), offloaded

    def run(self, ids: "torch.Tensor", sink: Sink, captured: "Callable[[torch.Tensor], None] | None" = None) -> None:
        """Forward token ids (window, position), padded on the right; hand every chunk of every hook point to `sink`.

        Values are in the stored dtype; `captured` sees each of them before.
        """
        position = dict.fromkeys((p.name for p in self._points), 0)
        over_keys = {p.name for p in self._points if p.over_keys}
        on_gpu = self._loaded.device.type == "cuda"

        def hand_over(name: str, value: "torch.Tensor") -> None:
            if name in over_keys:  # (window, head, position, key): a row is a position's
                value = value.transpose(1, 2)
            # a GPU goes on while the value is copied from it: it must not be one that the model still writes to
            rows = value.to(self._dtype, copy=on_gpu)
            if on_gpu:
                rows = rows.contiguous()
            if captured is not None:
                captured(rows)
            sink(name, position[name], rows)
            position[name] += rows.shape[1]

        with Taps(self._loaded.architecture, self._points, hand_over) as taps:
            prefill(taps, ids, self._chunk_size, self._offloaded)
