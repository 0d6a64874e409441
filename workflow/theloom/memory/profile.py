"""Memory debugging: which storages are alive at the memory peak of a shard's largest batch, and
what made them.

Requested by `memory.profile_shard`. Two files come of it, `.txt` to read and `.json` with the same,
and on a GPU the allocator's own history, `.pickle`, which pytorch.org/memory_viz shows. Recording
slows a batch and changes no value.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.devices import accelerator
from theloom.model.loading import LoadedModel
from theloom.terminal import format_bytes

if TYPE_CHECKING:
    import torch

    from theloom.memory.storages import LiveStorages


log = logging.getLogger(__name__)

# allocations and frees that the allocator's history keeps, some KB each with its Python frames
HISTORY = 200_000
WHOLE_MODEL, OUTSIDE = "(the model itself)", "(outside the model)"


class ShardProfile:
    """Records the batches of the numbers given: into `memory/` beside the folder of the shard
    `output`, by its name.

    Of several batches, or of one that goes through block after block, the files are of the highest
    peak.
    """

    def __init__(self, loaded: LoadedModel, output: Path, numbers: Collection[int]) -> None:
        self._loaded, self._numbers = loaded, numbers
        self._file = output.parent.parent / "memory" / f"{output.stem}.txt"
        self._highest = -1
        self._said: set[int] = set()

    @contextmanager
    def batch(
        self, number: int, ids: "torch.Tensor", there: "Callable[[], list[torch.Tensor]]" = list
    ) -> Iterator["Callable[[torch.Tensor], None] | None"]:
        """Record a batch, whether it fails or not.

        Args:
            number: of the batch, from 0.
            ids: its token ids, (windows, positions) int64.
            there: returns tensors that were there before, which are not counted.

        Yields:
            What is to see captured values; None if the batch is not recorded.
        """
        if number not in self._numbers:
            yield None
            return
        from theloom.memory.storages import LiveStorages
        from theloom.memory.trace import CAPTURED, CPU_KERNELS, CUDA_KERNELS

        if number not in self._said:
            log.warning(
                "memory.profile_shard: batch %d is recorded, which slows it down", number + 1
            )
            self._said.add(number)
        device, model = self._loaded.device.type, self._loaded.architecture.model
        kernels: dict[str, Any] = (
            {"inside": CPU_KERNELS} if device == "cpu" else {"whole": CUDA_KERNELS}
        )
        running, failed = _Running(model), None
        live = LiveStorages(lambda: running.name, device=device, **kernels)
        live.ignore([ids, *there(), *model.parameters(), *model.buffers()])
        with accelerator.memory_history(self._loaded.device, HISTORY):
            try:
                with running.watch(live), live:
                    yield lambda value: live.mark(value, CAPTURED)
            except BaseException as error:
                failed = f"{type(error).__name__} in {running.stopped_in}"
                raise
            finally:
                head = {
                    "batch": number + 1,
                    "windows": ids.shape[0],
                    "tokens": ids.shape[1],
                    "device": device,
                }
                head |= {"weight_bytes": _weights(model), "failed": failed}
                self._keep(head | _found(live, running))

    def _keep(self, found: dict[str, Any]) -> None:
        """Write the files, unless those that are there are of a higher peak; failing at it does not
        end the job.
        """
        if found["peak_bytes"] < self._highest and not found["failed"]:
            return
        self._highest, text = found["peak_bytes"], self._file
        try:
            text.parent.mkdir(exist_ok=True)
            text.write_text(_table(found), encoding="utf-8")
            text.with_suffix(".json").write_text(
                json.dumps(found, indent=2) + "\n", encoding="utf-8"
            )
            if found["device"] == "cuda":
                accelerator.write_memory_history(str(text.with_suffix(".pickle")))
            log.info("%s; see %s", _in_one_line(found), text)
        except OSError as error:
            log.warning("the memory profile could not be written: %s", error)


def _weights(model: "torch.nn.Module") -> int:
    """Bytes of the parameters and buffers that are there: layer by layer, those of one block and
    what is in none.
    """
    return sum(
        tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta
    )


class _Running:
    """Which module of a model runs, and between which events of storages each one ran.

    A forward pass may end by an exception, as `taps.Taps` ends it, which
    torch.utils.module_tracker does not get over: the hook of the whole model is called then too,
    and closes all that is open.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        self._model = model
        self._open: list[
            tuple[str, int]
        ] = []  # modules that run, from the outside in, and their first events
        self.spans: dict[
            str, list[tuple[int, int]]
        ] = {}  # by module, in the order of their first runs
        self.stopped_in = OUTSIDE

    @property
    def name(self) -> str:
        """The innermost module that runs."""
        return self._open[-1][0] if self._open else OUTSIDE

    @contextmanager
    def watch(self, live: "LiveStorages") -> Iterator[None]:
        """Follow the model within the block."""
        handles = [
            h
            for path, m in self._model.named_modules()
            for h in self._hook(m, path or WHOLE_MODEL, live)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: "torch.nn.Module", name: str, live: "LiveStorages") -> list[Any]:
        def enter(*_: Any) -> None:
            self.spans.setdefault(name, [])
            self._open.append((name, len(live.events)))

        def leave(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            if name == WHOLE_MODEL:
                self.stopped_in = self.name
                _mark_cache(kwargs.get("past_key_values"), live)
            closed = ""
            while closed != name:
                closed, first = self._open.pop()
                self.spans[closed].append((first, len(live.events)))

        left = module.register_forward_hook(
            leave, with_kwargs=True, always_call=name == WHOLE_MODEL
        )
        return [module.register_forward_pre_hook(enter), left]


def _mark_cache(cache: Any, live: "LiveStorages") -> None:
    """Say that what a KV cache holds is its own; what it held before was marked after the step
    before.
    """
    import torch

    from theloom.memory.trace import KV_CACHE

    for layer in getattr(cache, "layers", ()):
        for value in (v for v in vars(layer).values() if isinstance(v, torch.Tensor)):
            live.mark(value, KV_CACHE)


def _found(live: "LiveStorages", running: _Running) -> dict[str, Any]:
    """The peak: its bytes by category, what made the storages that were alive then, and the peak in
    each module.
    """
    peak = live.peak()
    size: Counter[tuple[str, str, str]] = Counter()
    count = Counter((s.module, s.operation, s.category) for s in peak.storages)
    for s in peak.storages:
        size[s.module, s.operation, s.category] += s.nbytes
    alive = np.cumsum([0, *(nbytes for _, nbytes in live.events)])
    last = (
        peak.storages[-1] if peak.storages else None
    )  # live bytes are the most at a birth: that of the youngest
    return {
        "peak_bytes": peak.total,
        "peak_in": last.module if last else OUTSIDE,
        "peak_operation": last.operation if last else "",
        "by_category": dict(sorted(peak.by_category.items(), key=lambda item: -item[1])),
        "alive_at_peak": [
            {
                "bytes": n,
                "storages": count[made],
                "module": made[0],
                "operation": made[1],
                "category": made[2],
            }
            for made, n in size.most_common()
        ],
        "peak_by_module": {
            name: max((int(alive[first : end + 1].max()) for first, end in spans), default=0)
            for name, spans in running.spans.items()
        },
    }


def _in_one_line(found: dict[str, Any]) -> str:
    place = (
        f"{format_bytes(found['peak_bytes'])} beyond the weights, in {found['peak_in']} "
        f"({found['peak_operation']})"
    )
    failed = f"; the batch failed: {found['failed']}" if found["failed"] else ""
    return f"memory peak of batch {found['batch']}: {place}{failed}"


def _table(found: dict[str, Any]) -> str:
    """All that was found, as text."""
    lines = [
        _in_one_line(found),
        "windows: {windows}; tokens of each: {tokens}; bytes of weights: {weight_bytes:,}".format(
            **found
        ),
    ]
    lines += ["", f"{'bytes':>16}  alive at the peak, by category"]
    lines += [f"{n:>16,}  {category}" for category, n in found["by_category"].items()]
    lines += [
        "",
        f"{'bytes':>16}  {'storages':>8}  alive at the peak, by the module and the "
        "operation that made them",
    ]
    row = "{bytes:>16,}  {storages:>8}  {module}  {operation}  {category}"
    lines += [row.format(**made) for made in found["alive_at_peak"]]
    lines += [
        "",
        f"{'bytes':>16}  the most alive at once while a module ran, in the order of their "
        "first runs",
    ]
    lines += [f"{n:>16,}  {module}" for module, n in found["peak_by_module"].items()]
    return "\n".join(lines) + "\n"
