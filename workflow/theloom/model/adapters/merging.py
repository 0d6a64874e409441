"""Adapters merged into a model by PEFT's own layers: the whole model at once, or part by part.

PEFT puts its layers into the model, loads the adapter into them, and they are taken out again: what
is kept is one step for each module that an adapter changes. A step runs when the module has its
weights, so that a model on the meta device is merged as its parts are read, with the arithmetic of
`merge_and_unload`.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from theloom.devices.accelerator import is_out_of_memory
from theloom.errors import ModelError
from theloom.hooks.failures import MODEL_ERRORS, why
from theloom.model.adapters.files import KEY, WEIGHTS, AdapterFiles
from theloom.model.checkpoint.classes import auto_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NAME = "default"  # PEFT's name of an adapter that is alone in a model
# what PEFT raises at an adapter that it does not read, or does not merge
_OF_PEFT = (*MODEL_ERRORS, ImportError, re.error)
# by these PEFT knows a quantised model, and takes layers that merge into quantised weights
_QUANTIZED = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer")
_PREFIX = "base_model.model."  # of the keys of every adapter


@dataclass(frozen=True)
class _Replacement:
    """A parameter that the adapter brings along whole."""

    module: nn.Module
    leaf: str
    value: torch.Tensor

    def apply(self) -> None:
        parameter = getattr(self.module, self.leaf)
        # in memory of its own, as PEFT has it: the next adapter changes it in place
        parameter.data = self.value.to(parameter.device, parameter.dtype, copy=True)


@dataclass(frozen=True)
class _Merge:
    """One of PEFT's layers, round a module of the model."""

    module: nn.Module
    layer: Any

    def apply(self) -> None:
        device = next(self.module.parameters()).device
        for table in _own_tables(self.layer):
            for leaf, tensor in table.items():
                if tensor is not None and tensor.device != device:
                    if isinstance(tensor, nn.Parameter):
                        table[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
                    else:
                        table[leaf] = tensor.to(device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rounding, which each quantised merge says anew
            self.layer.merge(safe_merge=False, adapter_names=[_NAME])
        self.layer.merged_adapters.clear()
        getattr(self.layer, "_caches", {}).clear()


@dataclass
class MergedAdapters:
    """The adapters of a model, to be merged into its modules.

    Attributes:
        held: Bytes of their tensors.
        ignored: For each adapter, the modules outside the model (heads) that it changes too.
    """

    steps: list[_Replacement | _Merge] = field(default_factory=list)
    held: int = 0
    ignored: list[list[str]] = field(default_factory=list)

    @property
    def working(self) -> int:
        """Bytes that merging takes for a moment: twice the largest weight that is changed, in FP32,
        for what is added to it, and a copy.
        """
        changed = [step.module for step in self.steps if isinstance(step, _Merge)]
        return 8 * max((p.numel() for module in changed for p in module.parameters()), default=0)

    def merge(self, modules: Collection[nn.Module] | None = None) -> None:
        """Merge the adapters into modules that have their weights. Call it once after the weights
        were put into the modules.

        Args:
            modules: Of the model; None: all.

        Raises:
            ModelError: PEFT does not merge.
        """
        for step in self.steps:
            if modules is None or step.module in modules:
                try:
                    step.apply()
                except _OF_PEFT as error:
                    if is_out_of_memory(error):
                        raise
                    raise ModelError(f"{KEY}: cannot be merged: {why(error)}") from None


def read_adapters(
    model: Any, adapters: Sequence[AdapterFiles], left_out: Collection[str] = ()
) -> MergedAdapters:
    """Read adapters for a model, which stays as it is until they are merged.

    Args:
        model: The model of transformers, with a head or without, on the meta device or not.
        adapters: The adapters, in the order in which they are merged.
        left_out: Names of the model's modules that are not loaded.

    Returns:
        What merges them.

    Raises:
        ModelError: An adapter is of another model, or damaged.
    """
    merged = MergedAdapters()
    for files in adapters:
        where = f"{KEY}: {files.source}"
        tensors = _tensors(files, where)
        try:
            with _quiet(), _unchanged(model):
                steps, ignored = _steps(model, files, tensors, left_out, where)
        except _OF_PEFT as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{where} does not fit {type(model).__name__}: {why(error)}; give the adapter "
                f"of this model{f' (it is of {files.base})' if files.base else ''}"
            ) from None
        merged.steps += steps
        merged.ignored.append(ignored)
        merged.held += sum(t.numel() * 4 for t in tensors.values())
    return merged


def check_adapters(
    model_config: "PretrainedConfig",
    adapters: Sequence[AdapterFiles],
    trust_remote_code: bool = False,
) -> list[list[str]]:
    """Check adapters against a whole model without bytes.

    Args:
        model_config: Of the model.
        adapters: In the order in which they are merged.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        For each, the modules outside the model (heads) that it changes too.

    Raises:
        ModelError: An adapter is of another model, or damaged.
    """
    with torch.device("meta"):
        model = auto_class(model_config, trust_remote_code).from_config(
            model_config, trust_remote_code=trust_remote_code
        )
    return read_adapters(model, adapters).ignored


def _tensors(files: AdapterFiles, where: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors by key, in memory of their own. Raises ModelError."""
    from safetensors.torch import load_file

    try:
        if files.weights.name == WEIGHTS:
            tensors = load_file(files.weights)
        else:
            tensors = torch.load(files.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever readers raise at a file is a fault of its bytes
        raise ModelError(f"{where}: {files.weights.name} cannot be read: {why(error)}") from None
    if not tensors:
        raise ModelError(f"{where}: {files.weights.name} holds no tensors; train or fetch it again")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{where}: {key} holds NaN or infinities, which would be in every row; take an "
                "earlier checkpoint"
            )
    return tensors


def _steps(
    model: Any,
    files: AdapterFiles,
    tensors: dict[str, torch.Tensor],
    left_out: Collection[str],
    where: str,
) -> tuple[list[_Replacement | _Merge], list[str]]:
    """What an adapter does to the modules of a model, and the modules outside that it names."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    prefix = _prefix(model, tensors)
    whole = _whole(model, prefix)
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    absent = tuple(f"{prefix}{name}." for name in left_out)
    tensors = {key: t for key, t in tensors.items() if not key.startswith(absent)}
    if not tensors:
        return [], []
    ours = set(model.modules())
    parameters = {
        id(t): (module, leaf)
        for module in ours
        for leaf, t in [*module._parameters.items(), *module._buffers.items()]
        if t is not None
    }
    config = PeftConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    if getattr(model, "is_quantized", False) and (
        files.kind != "LORA" or getattr(config, "use_dora", False)
    ):
        kind = "DoRA" if files.kind == "LORA" else files.kind
        raise ModelError(
            f"{where} is of the kind {kind}, which is not merged into quantised weights; take "
            "unquantised ones (memory.quantization=null)"
        )
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    with torch.no_grad():
        tuner_class(whole, config, adapter_name=_NAME, low_cpu_mem_usage=True)
    named, fitted = _fitted(whole, tensors)
    heads = _heads(model, fitted, prefix)
    loaded = {name for name, _ in model.named_children()}
    ignored = sorted(heads - (set() if prefix else loaded))
    fitted = {key: t for key, t in fitted.items() if key.split(".")[0] not in ignored}
    if strange := [key for key in fitted if key not in named]:
        raise ModelError(
            f"{where} has {len(strange)} weights that have no place in {type(model).__name__} "
            f"({strange[0].replace(f'.{_NAME}', '')}, …): it is of another model"
            f"{f' ({files.base})' if files.base else ''}; give the adapter of this model"
        )
    steps: list[_Replacement | _Merge] = []
    for key, tensor in fitted.items():
        parent, _, leaf = key.rpartition(".")
        current = named[key]
        if current.shape != tensor.shape:
            raise ModelError(
                f"{where} has {tuple(tensor.shape)} for {key.replace(f'.{_NAME}', '')}, and the "
                f"model wants {tuple(current.shape)}: it is of another model"
                f"{f' ({files.base})' if files.base else ''}; give the adapter of this model"
            )
        value = tensor.to(current.dtype)
        if id(current) in parameters:
            steps.append(_Replacement(*parameters[id(current)], value))
        else:
            module = whole.get_submodule(parent)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
    for name, module in whole.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved, original = module.modules_to_save[_NAME], module.original_module
            if original in ours:
                for path, parameter in saved.named_parameters():
                    inner, _, leaf = path.rpartition(".")
                    steps.append(_Replacement(original.get_submodule(inner), leaf, parameter.data))
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if base not in ours:
                continue
            if hasattr(module, "trainable_tokens_original"):  # to unmerge, which nobody does
                module.trainable_tokens_original.clear()
            _check_complete(module, name, where)
            steps.append(_Merge(base, module))
    return steps, ignored


def _fitted(
    whole: Any, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a model with PEFT's layers, and those of an adapter, both by the same names.

    `set_peft_model_state_dict` translates the adapter's keys, and then calls `load_state_dict`,
    which would move the tensors to where the model's are: to the meta device.
    """
    from peft import set_peft_model_state_dict

    fitted: dict[str, torch.Tensor] = {}

    def load_state_dict(state: dict[str, torch.Tensor], **_: Any) -> Any:
        fitted.update(state)
        return nn.modules.module._IncompatibleKeys([], [])

    whole.load_state_dict = load_state_dict
    try:
        set_peft_model_state_dict(whole, tensors, adapter_name=_NAME)
    finally:
        del whole.load_state_dict
    named = dict(whole.named_parameters(remove_duplicate=False))
    return named | dict(whole.named_buffers(remove_duplicate=False)), fitted


def _heads(model: Any, keys: Collection[str], prefix: str) -> set[str]:
    """The names of the modules that keys of an adapter are of and that are next to the model."""
    inside = prefix or f"{getattr(model, 'base_model_prefix', '')}."
    if not prefix and inside.removesuffix(".") not in model._modules:
        return set()  # the adapter is of a model without a head
    return {key.split(".")[0] for key in keys if not key.startswith(inside)}


def _check_complete(layer: Any, name: str, where: str) -> None:
    """Whether the adapter has all tensors of one of PEFT's layers. Raises ModelError."""
    for table in _own_tables(layer):
        for leaf, tensor in table.items():
            if tensor is not None and tensor.is_meta:
                raise ModelError(
                    f"{where} lacks weights ({leaf} of {name}); its file is incomplete, or of "
                    "another kind than its config says"
                )


def _own_tables(layer: Any) -> Iterator[dict[str, Any]]:
    """Parameters and buffers of one of PEFT's layers, without those of the module within."""
    inside = set(layer.get_base_layer().modules())
    for module in layer.modules():
        if module not in inside:
            yield module._parameters
            yield module._buffers


def _prefix(model: Any, tensors: Collection[str]) -> str:
    """What stands before the model's own names in an adapter's keys: that of a model with a head,
    or nothing.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or prefix in model._modules:
        return ""
    return f"{prefix}." if any(k.startswith(f"{_PREFIX}{prefix}.") for k in tensors) else ""


def _whole(model: Any, prefix: str) -> Any:
    """The model as the adapter knows it: within the class with a head, on the meta device."""
    import transformers

    if not prefix:
        return model
    name = prefix.removesuffix(".")
    config = model.config
    heads: list[Any] = [getattr(transformers, n, None) for n in config.architectures or ()]
    heads.append(transformers.AutoModelForCausalLM._model_mapping.get(type(config), None))
    for head in heads:
        if getattr(head, "base_model_prefix", None) == name and hasattr(head, "_from_config"):
            with torch.device("meta"):
                whole: Any = head._from_config(config)
            if type(getattr(whole, name, None)) is type(model):
                setattr(whole, name, model)
                for mark in _QUANTIZED:
                    if hasattr(model, mark):
                        setattr(whole, mark, getattr(model, mark))
                return whole
    bare = nn.Module()
    bare.add_module(name, model)
    return bare


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Take everything out of a model that PEFT has put into it."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    marks = set(vars(model))
    try:
        yield
    finally:
        for module, own in children:
            module._modules.clear()
            module._modules.update(own)
        for parameter, was in required:
            parameter.requires_grad_(was)
        for mark in set(vars(model)) - marks:
            delattr(model, mark)


@contextmanager
def _quiet() -> Iterator[None]:
    """What PEFT warns of while it loads is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
