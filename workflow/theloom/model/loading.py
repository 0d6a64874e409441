"""Load a model for extraction: at the resolved precision, on the device, without its LM head,
unmodified.
"""

import logging
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from theloom.config.auto import traceable_attention
from theloom.config.model_dims import stages_of
from theloom.config.schema import Config
from theloom.devices import accelerator, gpu, gpu_lease
from theloom.errors import ModelError
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.points import HookCatalog, HookPoint
from theloom.model import device_map, weight_format
from theloom.model.checkpoint.classes import (
    auto_class,
    causal_class,
    has_own_code,
    model_class,
)
from theloom.model.checkpoint.inner_keys import report_held_back
from theloom.model.checkpoint.key_mapping import key_mapping
from theloom.model.checkpoint.weights import check_loaded, tensors_in
from theloom.model.files import ModelFiles, config_in, hf_config
from theloom.model.quantization import bitsandbytes_config, one_tensor_at_a_time
from theloom.model.weight_format import quantization_of
from theloom.precision import TOLERANCE, Resolved, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from theloom.model.fake import FakeModel


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, ready for forward passes, and how it came to be there."""

    architecture: Architecture
    files: ModelFiles
    device: "torch.device"
    precision: Resolved
    attention: str
    quantization: str | None
    left_out: tuple[str, ...] = ()  # modules that are not loaded
    ignored: tuple[list[str], ...] = ()  # of each adapter: the heads that it changes too

    @property
    def tolerance(self) -> float:
        """The error that rounding explains; bitsandbytes rounds to 16 bits inside, whatever the
        precision around it.
        """
        return max(
            TOLERANCE[self.precision.resolved], TOLERANCE["bf16"] if self.quantization else 0
        )

    @property
    def catalog(self) -> HookCatalog:
        """The hook points that can be read from it."""
        from theloom.hooks.catalog import build_catalog

        return build_catalog(self.architecture)


class Target(NamedTuple):
    """Where a model is loaded, and the precision resolved for that device."""

    device: "torch.device"
    precision: Resolved


def resolve_precision(config: Config, exact: str | None = None) -> Target:
    """Resolve the device of a run and its precision there; each fallback is logged as a warning.

    Args:
        config: The run's config.
        exact: The precision, fp32 or fp64, whatever the config requests.

    Returns:
        The device, and the precision as requested and as it is there.

    Raises:
        ConfigError: The device is not available.
    """
    device = _device(config)
    if exact is None:
        return Target(device, gpu.precision_on(device, config.memory.precision_mode.name))
    if exact == "fp64" and device.type == "mps":
        device = gpu.choose_device("cpu")  # which has it, where Apple's GPUs do not
    return Target(device, Resolved(exact, exact, ()))


def _device(config: Config) -> "torch.device":
    """The device of a run, on which FP32 means FP32 from now on."""
    accelerator.exact_fp32()
    return gpu.choose_device(config.extraction.device)


def load_model(
    config: Config,
    files: ModelFiles,
    points: Sequence[HookPoint] | None = None,
    exact: str | None = None,
    target: Target | None = None,
    lm_head: bool = False,
    whole: "FakeModel | None" = None,
) -> LoadedModel:
    """Load a model: all of it, or what reading `points` needs.

    Tensors go one by one to their device and precision; what is not needed is not read. A quantized
    checkpoint is taken as it is.

    Args:
        config: The run's config.
        files: The model's files (`model.files.prepare_files`).
        points: The hook points to read; None: any.
        exact: Load in this precision, fp32 or fp64, and not quantized, whatever the config
            requests.
        target: The device and the precision, if they are resolved already.
        lm_head: Load the model that writes text: with its LM head, and whole.
        whole: The whole model on tensors without bytes in the target's precision, if it is built
            already; it tells what reading `points` needs.

    Returns:
        The model in eval mode, without gradients, on its device.

    Raises:
        ModelError: The model writes no text, or a weight is missing or has another shape.
    """
    from theloom.model import attention_kernels
    from theloom.model.adapters.merging import read_adapters

    attention_kernels.repeat_keys_where_needed()
    device, resolved = target or resolve_precision(config, exact)
    options: dict[str, Any] = (
        {}
        if device.type == "cpu"
        else {"device_map": _device_map(config, device, resolved, lm_head)}
    )
    if config.extraction.attention.name != "auto":
        options["attn_implementation"] = config.extraction.attention.name
    model_config = config_in(files, config.model.trust_remote_code)
    own = quantization_of(config, model_config)
    quantization = own or (None if exact else weight_format.requested_quantization(config))
    in_stages = bool(stages_of(model_config))
    seen = points is not None or in_stages
    whole = _without_bytes(config, resolved.resolved, whole) if seen else None
    left_out = whole.unneeded(points) if whole is not None and points is not None else []
    if quantization is not None:
        # transformers leaves the last module as it is, which of a model without its end would be
        # another one
        from transformers.quantizers.base import get_keys_to_not_convert

        stays = None if whole is None else get_keys_to_not_convert(whole.architecture.model)
        new = bitsandbytes_config(quantization, resolved.resolved, stays)
        if own is None:
            options["quantization_config"] = new
        else:
            log.info("its weights are quantised to %s already, and loaded as they are", own)
    stored = tensors_in(files.folder, config.model)
    if not lm_head and (mapping := key_mapping(model_config, stored)):
        options["key_mapping"] = mapping
    try:
        with one_tensor_at_a_time(), report_held_back():
            part = (
                causal_class(model_config, config.model)
                if lm_head
                else _part_of_model(config, model_config, left_out, whole)
            )
            model, info = part.from_pretrained(
                files.folder,
                dtype=torch_dtype(resolved.resolved),
                use_safetensors=None if config.model.allow_pickle else True,
                trust_remote_code=config.model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which `check_loaded` does not
                **options,
            )
    except Exception as error:  # whatever transformers raises at files is a fault of theirs
        if isinstance(error, MemoryError | ModelError) or "memory" in str(error):
            raise
        raise ModelError(
            f"model.source: {config.model.source}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from None
    if left_out:
        model.__class__ = type(model).__base__  # the class as transformers has it
    check_loaded(model, info, config.model.source, stored)
    adapters = read_adapters(model, files.adapters, left_out)
    adapters.merge()
    if quantization == "4bit" and device.type == "cpu":
        from theloom.model.quantization import check_runs_on_the_cpu

        check_runs_on_the_cpu(model)
    if not lm_head:
        device_map.keep_all_busy(model, options.get("device_map", {}))
    model.eval().requires_grad_(False)
    let_experts_run(model, resolved.resolved)
    _read_in(model)
    attention = str(model.config._attn_implementation)
    if in_stages and whole is not None:
        described = whole.architecture.on(model)
    else:
        described = getattr(model, "_described", None) or find_blocks(model)
    return LoadedModel(
        described,
        files,
        device,
        resolved,
        attention,
        quantization,
        tuple(left_out),
        tuple(adapters.ignored),
    )


def let_experts_run(model: Any, precision: str) -> None:
    """Have experts of FP64 computed one by one: the product of all at once takes no FP64.

    Args:
        model: Of transformers; it is changed where that is needed.
        precision: Of the model: fp64, fp32, fp16 or bf16.
    """
    if precision == "fp64":
        model.set_experts_implementation("eager")


def _read_in(model: "nn.Module") -> None:
    """Have all weights in memory from the start: mapped files come page by page, and a run's memory
    would grow.
    """
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            stored[:: mmap.PAGESIZE].sum()


def _without_bytes(config: Config, resolved: str, built: "FakeModel | None") -> "FakeModel | None":
    """The whole model on tensors without bytes, by which it is loaded in part: `built`, or built
    now; None for one whose code is its own.
    """
    from theloom.model import fake

    model_config = hf_config(config.model)
    if has_own_code(model_config, config.model.trust_remote_code):
        return None
    if built is not None:
        return built
    attention = traceable_attention(config.extraction.attention.name)
    return fake.fake_model(model_config, resolved, attention=attention)


def _part_of_model(
    config: Config,
    model_config: "PretrainedConfig",
    left_out: list[str],
    whole: "FakeModel | None",
) -> Any:
    """The class that loads a model without the modules of these names: they are gone before weights
    are looked for.
    """
    from theloom.model import pruning

    if not left_out or whole is None:
        return auto_class(model_config, config.model.trust_remote_code)
    base, described = model_class(model_config), whole.architecture

    def build(self: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, *args, **options)
        pruning.leave_out(self, left_out)
        object.__setattr__(self, "_described", described.on(self))
        self._keys_to_ignore_on_load_unexpected |= {
            rf"(^|\.){re.escape(name)}\." for name in left_out
        }

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _device_map(
    config: Config, device: "torch.device", resolved: Resolved, lm_head: bool
) -> "dict[str, torch.device] | str":
    """Everything on one device, or over the GPUs of this job. Raises MemoryPlanError."""
    if len(gpu_lease.held()) < 2:
        return {"": device}
    if lm_head:
        return "balanced"
    kind = weight_format.weight_format_of(config, resolved.resolved)
    return device_map.over_leased(hf_config(config.model), kind, config.model.trust_remote_code)
