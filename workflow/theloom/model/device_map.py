"""Several GPUs for one model: which module goes to which of them, and what goes from one to the
next.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from theloom import terminal
from theloom.config.model_dims import stages_of
from theloom.devices import gpu_lease, streams
from theloom.devices.gpu import available_memory, compute_capability
from theloom.devices.streams import Mark, SideStreams
from theloom.devices.workspace import Capability, cublas_workspace
from theloom.errors import MemoryPlanError, ModelError
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.model.weight_format import WeightFormat, quantized_bytes
from theloom.precision import BYTES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def device_map(
    architecture: Architecture, sizes: Sequence[int], budgets: Sequence[int]
) -> dict[str, int]:
    """Choose which module goes to which GPU, for `from_pretrained`.

    Each GPU takes blocks in proportion to its budget, and those before the first block and behind
    the last go with their neighbours.

    Args:
        architecture: the model with its blocks.
        sizes: bytes of each block's weights.
        budgets: bytes that each GPU may give to blocks.

    Returns:
        The number of each module's GPU, by the module's name.

    Raises:
        MemoryPlanError: the blocks do not fit.
    """
    names = {id(module): name for name, module in architecture.model.named_modules()}
    ends = _cut(sizes, budgets)
    gpu_of = {
        id(block): next(n for n, end in enumerate(ends) if i < end)
        for i, block in enumerate(architecture.blocks)
    }
    blocks = set(gpu_of)
    found: dict[str, int] = {}

    def walk(module: Any, gpu: int) -> int:
        """Name every module that holds no block, and every block; returns the GPU of the last block
        seen.
        """
        if id(module) in blocks:
            found[names[id(module)]] = gpu_of[id(module)]
            return gpu_of[id(module)]
        if not any(id(m) in blocks for m in module.modules()):
            # what comes behind the blocks in the model's own order, such as the final norm, goes
            # with the last of them; the tables of rotary positions are small, and are where the
            # first block is
            stateless = not any(True for _ in module.parameters())
            found[names[id(module)]] = 0 if stateless else gpu
            return gpu
        for child in module.children():
            gpu = walk(child, gpu)
        return gpu

    walk(architecture.model, 0)
    return found


def _cut(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """The end of each GPU's range of blocks: as even a use of the budgets as whole blocks allow."""
    low, high = 0.0, 1.0
    if (ends := _filled(sizes, budgets, high)) is None:
        raise MemoryPlanError(
            f"{terminal.format_bytes(sum(sizes))} of blocks do not fit {len(budgets)} GPUs with "
            f"{', '.join(terminal.format_bytes(b) for b in budgets)} for them; ask for more "
            "with resources.gpu"
        )
    for _ in range(20):
        middle = (low + high) / 2
        if (tried := _filled(sizes, budgets, middle)) is None:
            low = middle
        else:
            high, ends = middle, tried
    return ends


def _filled(sizes: Sequence[int], budgets: Sequence[int], level: float) -> list[int] | None:
    """Fill one GPU after the other up to a share of its budget; None where blocks are left over."""
    ends, block = [], 0
    for budget in budgets:
        used = 0
        while block < len(sizes) and used + sizes[block] <= level * budget:
            used += sizes[block]
            block += 1
        ends.append(block)
    return ends if block == len(sizes) else None


def over_leased(
    model_config: "PretrainedConfig", kind: WeightFormat, trust_remote_code: bool = False
) -> "dict[str, Any]":
    """Choose the `device_map` of a model over the GPUs of this job.

    Args:
        model_config: of the model.
        kind: format of its weights.
        trust_remote_code: the model's own code may run.

    Returns:
        The GPU of each module, by the module's name.

    Raises:
        MemoryPlanError: the blocks do not fit.
    """
    import torch

    from theloom.model.checkpoint.classes import auto_class

    if stages_of(model_config):
        raise MemoryPlanError(
            f"{model_config.model_type}: a model in stages is not cut to several GPUs, and this "
            f"job holds {len(gpu_lease.held())}; set resources.gpu=1"
        )
    with torch.device("meta"):
        model = auto_class(model_config, trust_remote_code).from_config(
            model_config, trust_remote_code=trust_remote_code
        )
    gpus = [torch.device("cuda", number) for number in range(len(gpu_lease.held()))]
    free = [available_memory(gpu)[0].free for gpu in gpus]
    described = _to_be_cut(model)
    cut = cut_to(described, kind, free, [compute_capability(gpu) for gpu in gpus])
    return {name: gpus[number] for name, number in cut.items()}


def _to_be_cut(model: "PreTrainedModel") -> Architecture:
    """The blocks of a model on the meta device, if they can be on several GPUs."""
    try:
        described = find_blocks(model)
        reason = "its blocks are not modules that take and give the residual stream"
    except ModelError as error:  # such as code that looks at values
        described, reason = None, str(error)
    if described is None or described.ends:
        raise MemoryPlanError(
            f"{model.config.model_type}: it cannot be cut to several GPUs ({reason}), and this job "
            f"holds {len(gpu_lease.held())}; set resources.gpu=1"
        )
    return described


def cut_to(
    architecture: Architecture,
    kind: WeightFormat,
    free: Sequence[int],
    capabilities: Sequence[Capability],
) -> dict[str, int]:
    """Cut a model to several GPUs.

    The first GPU has the weights that are in no block. Beside what its libraries take, a tenth is
    left for the forward pass, whose plan is made for what the fullest has.

    Args:
        architecture: of the model, which may be on the meta device.
        kind: format of its weights.
        free: bytes of each GPU.
        capabilities: the compute capability of each, by which its libraries take memory.

    Returns:
        The number of the GPU that each module goes to, by its name.

    Raises:
        MemoryPlanError: the blocks do not fit.
    """
    sizes = [_bytes(block, kind) for block in architecture.blocks]
    everything = sum(p.numel() for p in architecture.model.parameters())
    in_blocks = sum(p.numel() for block in architecture.blocks for p in block.parameters())
    budgets = [
        int(0.9 * max(0, room - cublas_workspace(capability)))
        for room, capability in zip(free, capabilities, strict=True)
    ]
    budgets[0] = max(0, budgets[0] - BYTES[kind.precision] * (everything - in_blocks))
    return device_map(architecture, sizes, budgets)


def _bytes(block: Any, kind: WeightFormat) -> int:
    """Bytes of a block's weights, its matrices quantised."""

    def held(count: int, dimensions: int) -> int:
        if kind.quantization is None or dimensions < 2:
            return count * BYTES[kind.precision]
        # a matrix in int8 has a scale a row, 0.1% of it, for which the tenth left free has room
        return quantized_bytes(kind.quantization, count, rows=0)

    return sum(held(p.numel(), p.ndim) for p in block.parameters())


def keep_all_busy(model: Any, places: "Mapping[str, torch.device]") -> None:
    """Have the GPUs of a loaded model work at the same time, each at a forward pass of its own.

    accelerate's hooks copy what a module needs from another GPU on the stream on which that
    computes: it would wait for the other GPU, which works at the pass before, at every block. Hooks
    that come before them copy it on streams of their own.

    Args:
        model: As `from_pretrained` loads it by these places.
        places: The GPU of each module by name, as of `over_leased`.
    """
    if len(set(places.values())) < 2:
        return
    borders = _Borders(model, len(set(places.values())))
    model.register_forward_pre_hook(borders.begin)
    loaded = dict(model.named_modules())
    for name, device in places.items():
        if name in loaded:  # else it is not needed
            loaded[name].register_forward_pre_hook(borders.to(device), with_kwargs=True)


class _Borders:
    """Copies between the GPUs of a model.

    A value that is copied is kept for as many passes as there are GPUs, since so many are on their
    way at once; then its GPU waits for the copy, which is done by then if all are busy.
    """

    def __init__(self, model: Any, gpus: int) -> None:
        self._skipped = model._skip_keys_device_placement or ()  # its cache, as a rule
        self._sides: dict[torch.device, SideStreams] = {}
        self._copied: deque[list[Mark]] = deque([[]])
        self._gpus = gpus

    def begin(self, *_: Any) -> None:
        """A pass begins."""
        self._copied.append([])
        while len(self._copied) > self._gpus:
            for mark in self._copied.popleft():
                mark.let_go()

    def to(self, device: "torch.device") -> Any:
        """The hook of a module on that GPU."""
        import torch

        sides = self._sides.setdefault(device, SideStreams())

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value if value.device in (device, torch.device("cpu")) else copied(value)
            if type(value) in (tuple, list):
                return type(value)(map(moved, value))
            if type(value) is dict:
                return {name: moved(one) for name, one in value.items()}
            return value  # what is of another kind is left to accelerate's hooks

        def copied(value: torch.Tensor) -> torch.Tensor:
            there, mark = streams.copy_across(value, device, sides)
            self._copied[-1].append(mark)
            return there

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = {n: v if n in self._skipped else moved(v) for n, v in kwargs.items()}
            return moved(args), own

        return hook
