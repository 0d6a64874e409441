"""Load a model for extraction: at the resolved precision, on the device, without its LM head, unmodified."""

import logging
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from theloom import architecture, gpu, lease, load_report, malloc, memory, precision, source
from theloom.architecture import Architecture, Numbers
from theloom.errors import ModelError
from theloom.estimator import quantized_as
from theloom.hooks import Catalogue, HookPoint
from theloom.precision import TOLERANCE, Resolved
from theloom.schema import ArchitectureConfig, Config, ModelConfig
from theloom.source import ModelFiles

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from theloom.trace import FakeModel

log = logging.getLogger(__name__)

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own switch


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

    @property
    def tolerance(self) -> float:
        """The error that rounding explains; bitsandbytes rounds to 16 bits inside, whatever the precision around it."""
        return max(TOLERANCE[self.precision.resolved], TOLERANCE["bf16"] if self.quantization else 0)

    @property
    def catalogue(self) -> Catalogue:
        """The hook points that can be read from it."""
        from theloom.catalogue import catalogue

        return catalogue(self.architecture)


def hf_config(config: ModelConfig) -> "PretrainedConfig":
    """The model's own config, read without its weights. Raises ModelError."""
    from transformers import AutoConfig

    place = source.describe(config)
    try:
        return AutoConfig.from_pretrained(
            place.folder, gguf_file=place.gguf_file, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = "its config is Python code of its own; set model.trust_remote_code=true if you trust it"
        raise ModelError(f"model.source: {config.source}: {message}") from None


def config_in(files: ModelFiles, trust_remote_code: bool) -> "PretrainedConfig":
    """The config in a model's own folder (`source.prepare`)."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)


def read_config(config: ModelConfig) -> Numbers:
    """The numbers of the model's own config. Raises ModelError."""
    return architecture.numbers(hf_config(config))


def quantization_of(config: Config, found: "PretrainedConfig") -> str | None:
    """`8bit` or `4bit` where a checkpoint is quantised itself. Raises ModelError where the config asks for another."""
    own = quantized_as(found)
    asked = memory.asked_quantization(config)
    if own is not None and asked not in (None, own):
        raise ModelError(
            f"memory.quantization={asked}: the weights of {config.model.source} are quantised to {own} already; "
            "leave memory.quantization=null, or take the unquantised weights"
        )
    return own


def check_architecture(declared: ArchitectureConfig | None, found: Numbers, source_name: str) -> None:
    """The profile's numbers, by which memory was planned, are those of the model. Raises ModelError."""
    if declared is None:
        return
    pairs = {
        "model_type": found.model_type,
        "hidden_size": found.hidden_size,
        "num_hidden_layers": found.num_blocks,
        "num_attention_heads": found.num_heads,
        "num_key_value_heads": found.num_kv_heads,
        "intermediate_size": found.intermediate_size,
        "vocab_size": found.vocab_size,
    }
    for name, value in pairs.items():
        planned = getattr(declared, name)
        if planned != value:
            raise ModelError(
                f"model.architecture.{name}: the profile says {planned}, the config of {source_name} says {value}; "
                "use profiles=custom for a model of your own, or set model.architecture=null"
            )


def resolve_precision(config: Config) -> tuple["torch.device", Resolved]:
    """The device of a run and the precision that it gets there."""
    device = gpu.choose_device(config.extraction.device)
    capability = gpu.compute_capability(device)
    asked = config.memory.precision_mode.name
    fp16_here = precision.cpu_has_fp16() if capability is None and asked == "fp16" else True
    return device, precision.resolve(asked, capability, fp16_here)


def before_counting(config: ModelConfig) -> None:
    """What a process does before its growth is counted, so that it is the same in `load_model` and in a job.

    Imports the code that a model of this config takes, and what tells which of its modules are needed; gives back the
    heap's free memory (of a checkpoint that was converted here, say).
    """
    from theloom import trace  # noqa: F401

    model_config = hf_config(config)
    if not _is_own_code(model_config):
        _model_class(model_config)
    malloc.give_back()


def load(
    config: Config, files: ModelFiles, points: Sequence[HookPoint] | None = None, exact: bool = False
) -> LoadedModel:
    """Load the model from its files (`source.prepare`): all of it, or what reading `points` needs.

    Tensors go one by one to their device and precision; what is not needed is not read. A quantised checkpoint is taken
    as it is. `exact`: in FP32 and not quantised, whatever the config asks for. Raises ModelError where any of the
    weights is missing or has another shape.
    """
    device, resolved = resolve_precision(config)
    if exact:
        resolved = Resolved("fp32", "fp32", ())
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": _device_map(config, device, resolved)}
    if config.extraction.attention.name != "auto":
        options["attn_implementation"] = config.extraction.attention.name
    own = quantization_of(config, config_in(files, config.model.trust_remote_code))
    quantization = own or (None if exact else memory.asked_quantization(config))
    whole = _without_bytes(config, resolved.resolved) if points is not None else None
    left_out = whole.unneeded(points) if whole is not None and points is not None else []
    if quantization is not None:
        # transformers leaves the last module as it is, which of a model without its end would be another one
        from transformers.quantizers.base import get_keys_to_not_convert

        stays = None if whole is None else get_keys_to_not_convert(whole.architecture.model)
        new = bitsandbytes_config(quantization, resolved.resolved, stays)
        if own is None:
            options["quantization_config"] = new
        else:
            log.info("its weights are quantised to %s already, and loaded as they are", own)
    try:
        with one_tensor_at_a_time(), load_report.kept_back():
            model, info = _part_of_model(config, left_out).from_pretrained(
                files.folder,
                dtype=precision.torch_dtype(resolved.resolved),
                use_safetensors=None if config.model.allow_pickle else True,
                trust_remote_code=config.model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which `load_report` does not
                **options,
            )
    except (ValueError, OSError, ImportError) as error:
        raise ModelError(f"model.source: {config.model.source}: {' '.join(str(error).split())}") from None
    if left_out:
        model.__class__ = type(model).__base__  # the class as transformers has it
    load_report.check(model, info, config.model.source)
    if quantization == "4bit" and device.type == "cpu":
        from theloom.quantized import check_runs_on_the_cpu

        check_runs_on_the_cpu(model)
    model.eval().requires_grad_(False)
    _read_in(model)
    attention = str(model.config._attn_implementation)
    described = getattr(model, "_described", None) or architecture.describe(model)
    return LoadedModel(described, files, device, resolved, attention, quantization, tuple(left_out))


def _read_in(model: "nn.Module") -> None:
    """Have all weights in memory from the start: mapped files come page by page, and a run's memory would grow."""
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            stored[:: mmap.PAGESIZE].sum()


def _without_bytes(config: Config, resolved: str) -> "FakeModel | None":
    """The whole model on tensors without bytes, by which it is loaded in part; None for one whose code is its own."""
    from theloom import trace

    model_config = hf_config(config.model)
    if _is_own_code(model_config):
        return None
    asked = config.extraction.attention.name
    attention = None if asked in ("auto", "flash_attention_2") else asked
    return trace.fake_model(model_config, resolved, attention=attention)


def _part_of_model(config: Config, left_out: list[str]) -> Any:
    """The class that loads a model without the modules of these names: they are gone before weights are looked for."""
    from transformers import AutoModel

    from theloom import needed

    if not left_out:
        return AutoModel
    whole = _model_class(hf_config(config.model))

    def build(self: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, *args, **options)
        described = architecture.describe(self)
        gone = {self.get_submodule(name): name for name in left_out}
        needed.leave_out(self, left_out)
        blocks = [self.get_submodule(gone[b]) if b in gone else b for b in described.blocks]
        object.__setattr__(self, "_described", architecture.Architecture(self, blocks, described.hidden_size))
        self._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){re.escape(name)}\." for name in left_out}

    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})


def _model_class(model_config: "PretrainedConfig") -> Any:
    """The class of transformers for a config, without a head."""
    from transformers import AutoModel

    found = AutoModel._model_mapping[type(model_config)]
    if not isinstance(found, list | tuple):
        return found
    classes: list[Any] = list(found)
    named = {c.__name__: c for c in classes}
    return next((named[n] for n in model_config.architectures or () if n in named), classes[0])


def _is_own_code(model_config: "PretrainedConfig") -> bool:
    """Whether the model's folder brings its own code, so that its class is not known beforehand."""
    return "AutoModel" in (getattr(model_config, "auto_map", None) or {})


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Have transformers load in this thread, so that at most one tensor waits in host memory for its device."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


def _device_map(config: Config, device: "torch.device", resolved: Resolved) -> dict[str, "torch.device"]:
    """Everything on one device, or over the GPUs that this job has leased. Raises MemoryPlanError."""
    if len(lease.held()) < 2:
        return {"": device}
    from theloom import memory, placement

    kind = memory.kind_of(config, resolved.resolved)
    return placement.over_leased(hf_config(config.model), kind, config.model.trust_remote_code)


def bitsandbytes_config(bits: str, compute: str, stays: list[str] | None = None) -> Any:
    """The config of bitsandbytes; `stays`: names of modules that are not quantised, where not those that it finds."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"memory.quantization={bits} needs bitsandbytes: pip install 'theloom[quantization]'")
    if bits == "8bit":
        # it says at every product of every layer that it computes in float16
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        log.info("8-bit weights: bitsandbytes computes their products in float16")
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=stays)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=precision.torch_dtype(compute),
        llm_int8_skip_modules=stays,
    )
