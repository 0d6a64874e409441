"""What runs the blocks over one batch: resident execution, with the model on the device as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from theloom.config.schema import Config
from theloom.corpus.batching import Lengths
from theloom.devices import gpu
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine import model_record
from theloom.engine.batch_loop import Sink, Work, run_batches
from theloom.engine.model_record import ModelRecord
from theloom.hooks.points import HookPoint
from theloom.hooks.taps import Taps
from theloom.memory.profile import ShardProfile
from theloom.model import loading, weight_format
from theloom.model.forward import prefill
from theloom.model.loading import LoadedModel
from theloom.planning import measure, multi_gpu
from theloom.planning.estimate import Estimate
from theloom.planning.plan import Plan, Planned, check_begun
from theloom.precision import torch_dtype
from theloom.store.partial import begun, partial_of
from theloom.store.shard_file import ShardSpec
from theloom.store.writer import ShardWriter

if TYPE_CHECKING:
    import torch


class ResidentRunner:
    """Runs batches through a model that is on the device as a whole."""

    def __init__(
        self,
        loaded: LoadedModel,
        points: list[HookPoint],
        chunk_size: int,
        store: str,
        offloaded: bool = False,
        causal: bool = True,
    ) -> None:
        self._loaded, self._points, self._chunk_size = loaded, points, chunk_size
        self._dtype, self._offloaded, self._causal = torch_dtype(store), offloaded, causal

    def run(
        self,
        ids: "torch.Tensor",
        sink: Sink,
        captured: "Callable[[torch.Tensor], None] | None" = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Forward token ids (window, position), padded on the right; hand every chunk of every hook
        point to `sink`.

        Values are in the stored dtype; `captured` sees each of them before. `lengths`, the tokens
        of each window, are what a model that is not causal masks its padding by.
        """
        position = dict.fromkeys((p.name for p in self._points), 0)
        over_keys = {p.name for p in self._points if p.over_keys}
        on_gpu = self._loaded.device.type == "cuda"

        def hand_over(name: str, value: "torch.Tensor") -> None:
            if name in over_keys:  # (window, head, position, key): a row is a position's
                value = value.transpose(1, 2)
            # a GPU goes on while the value is copied from it: it must not be one that the model
            # still writes to
            rows = value.to(self._dtype, copy=on_gpu)
            if on_gpu:
                rows = rows.contiguous()
            if captured is not None:
                captured(rows)
            sink(name, position[name], rows)
            position[name] += rows.shape[1]

        with Taps(self._loaded.architecture, self._points, hand_over) as taps:
            masked = None if self._causal else lengths or [ids.shape[1]] * len(ids)
            prefill(taps, ids, self._chunk_size, masked, self._offloaded)


@dataclass(frozen=True)
class ResidentJob:
    """What one job works on, whatever the size of its batches."""

    work: Work
    loaded: LoadedModel
    watch: MemoryWatch
    spec: ShardSpec
    output: Path
    profile: ShardProfile
    causal: bool

    def run(self, smaller: Plan, level: int) -> None:
        """Go on from the last committed row, to the end."""
        runner = ResidentRunner(
            self.loaded,
            self.work.points,
            smaller.chunk_size,
            self.work.precision,
            smaller.offloaded,
            self.causal,
        )
        with ShardWriter(self.output, self.spec) as writer:
            run_batches(runner, self.work, smaller, writer, self.profile, self.watch, level)
            writer.finish()


def load_counted(
    frozen: Config, recorded: ModelRecord, points: list[HookPoint]
) -> tuple[LoadedModel, MemoryWatch]:
    """The model, and a watch over the memory that it and the run take; the import of code is not
    counted.
    """
    device, _ = loading.resolve_precision(frozen)
    measure.before_counting(frozen.model)
    watch = MemoryWatch(device)
    return model_record.load_again(frozen, recorded, points), watch


def plan_resident(
    frozen: Config,
    estimated: Estimate,
    recorded: ModelRecord,
    windows: Lengths,
    output: Path,
    identity: str,
) -> Planned:
    """What fits the device now; a shard that was started is gone on with as it was started."""
    device, _ = loading.resolve_precision(frozen)
    kind, unfinished = (
        weight_format.weight_format_of(frozen, recorded.precision, recorded.quantization),
        begun(output, identity),
    )
    if unfinished is None:
        threshold = frozen.memory.memory_warning_threshold
        return multi_gpu.fit_plan(estimated, kind, device, threshold, windows, recorded.correction)
    as_begun = Plan(
        int(unfinished["batch_tokens"]),
        int(unfinished["chunk_size"]),
        windows.longest,
        int(unfinished.get("streamed_windows", 1)),
        unfinished.get("kv_cache") == "offloaded",
    )
    found, _ = gpu.available_memory(device)
    name = partial_of(output).name
    return check_begun(
        estimated, kind.name, device.type, found, as_begun.over(windows), recorded.correction, name
    )
