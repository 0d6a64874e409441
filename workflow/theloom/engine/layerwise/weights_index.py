"""The tensors of a checkpoint by the block that they belong to, and how a block's are put into a
model and taken out.

Safetensors files are read by their headers (the format's specification: 8 bytes of length, a JSON
header, the data). Keys of older or fused layouts go through transformers' own renaming and
conversion.
"""

import copy
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from theloom.engine.layerwise import quantize
from theloom.engine.layerwise.quantize import OnDisk, PartLoader
from theloom.errors import ModelError
from theloom.model.adapters.merging import MergedAdapters
from theloom.model.checkpoint.key_mapping import key_mapping

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

OUTSIDE = -1  # the part of a model that is in no block
ALIGNMENT = 512  # bytes, of a tensor's place in a buffer: that of CUDA's allocator
CACHE_LINE = 64


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies on disk."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def shift(self) -> int:
        """Bytes by which it is off a cache line, as it is where the file is mapped.

        A buffer on the host keeps that: products of one row depend on it by rounding, and resident
        models are mapped.
        """
        return self.offset % CACHE_LINE if self.offset % self.dtype.itemsize == 0 else 0

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer, with what comes before it."""
        return -(-(self.nbytes + CACHE_LINE) // ALIGNMENT) * ALIGNMENT


def index(folder: Path) -> dict[str, Stored]:
    """List all tensors of a folder's safetensors files.

    Args:
        folder: of the checkpoint.

    Returns:
        Where each tensor is, by its key; no tensor is read.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    listed = folder / "model.safetensors.index.json"
    try:
        if listed.is_file() and not (folder / "model.safetensors").is_file():
            names = sorted(
                set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values())
            )
        else:
            names = ["model.safetensors"]
        return {key: stored for name in names for key, stored in _header(folder / name).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder.name}: its safetensors cannot be read: {' '.join(str(error).split())}"
        ) from None


def _header(file: Path) -> dict[str, Stored]:
    with file.open("rb") as f:
        size = file.stat().st_size
        length = int.from_bytes(f.read(8), "little")
        if length > size:
            raise ModelError(f"{file.name} is cut short; fetch it again")
        entries = json.loads(f.read(length))
    stored = {}
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                f"{file.name}: {key} is of type {entry['dtype']}, not read layer by layer"
            )
        begin, end = entry["data_offsets"]
        elements = math.prod(entry["shape"])
        if begin < 0 or elements * DTYPES[entry["dtype"]].itemsize != end - begin:
            raise ModelError(
                f"{file.name}: {key} has the offsets {begin} to {end}, which are not those of its "
                "shape; fetch the file again"
            )
        stored[key] = Stored(
            file, 8 + length + begin, end - begin, DTYPES[entry["dtype"]], tuple(entry["shape"])
        )
    placed = sorted(stored.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for (before, one), (key, next_one) in itertools.pairwise(placed):
        if one.offset + one.nbytes > next_one.offset:
            raise ModelError(f"{file.name}: {before} and {key} share bytes; fetch the file again")
    if any(s.offset + s.nbytes > size for s in stored.values()):
        raise ModelError(f"{file.name} is cut short; fetch it again")
    return stored


class Checkpoint:
    """The keys of a checkpoint by block, and the places in a model on the meta device that they go
    to.

    `attach` gives a part (a block's number, or OUTSIDE) its tensors and merges adapters into it,
    `detach` makes it meta again.
    Of a quantised model `loader` makes a part's tensors, and `place` gives it them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[nn.Module],
        stored: Mapping[str, Stored],
        loader: PartLoader | None = None,
        adapters: MergedAdapters | None = None,
    ) -> None:
        self.stored = stored
        self.adapters = adapters
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._part_of = {m: number for number, block in enumerate(blocks) for m in block.modules()}
        self._places = self._all_places()
        self._loader, quantizer = loader, None if loader is None else loader.quantizer
        self._mapping = (
            get_model_conversion_mapping(
                model, key_mapping=key_mapping(model.config, stored), hf_quantizer=quantizer
            )
            or []
        )
        own = quantizer.get_weight_conversions() if quantizer is not None else []
        put_together = {pattern for converter in own for pattern in converter.source_patterns}
        self._targets: dict[str, str] = {}
        self._converted: set[int] = set()
        self.keys: dict[int, list[str]] = defaultdict(list)
        renamings = [w for w in self._mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in self._mapping if isinstance(w, WeightConverter)]
        state = model.state_dict()
        for key in stored:
            target, pattern = rename_source_key(
                key, renamings, converters, model.base_model_prefix, state
            )
            if target not in state:
                continue  # an LM head, say: never read
            part = self._part_of.get(model.get_submodule(target.rpartition(".")[0]), OUTSIDE)
            self.keys[part].append(key)
            self._targets[key] = target
            if pattern in put_together:
                self._keep_dtype(target, stored[key].dtype)
            elif pattern is not None:
                self._converted.add(part)
        for keys in self.keys.values():  # in the order of the files: read from front to back
            keys.sort(key=lambda k: (stored[k].file.name, stored[k].offset))
        self.parameters = model.num_parameters()

    def room(self, part: int) -> int:
        """The size of a buffer that holds a part as it is on disk.

        Args:
            part: the number of a block, or `OUTSIDE`.

        Returns:
            Bytes.
        """
        return sum(self.stored[k].room for k in self.keys[part])

    def held(self, part: int, mapped: Collection[str] = ()) -> int:
        """The size of a part once loaded and quantised.

        Args:
            part: the number of a block, or `OUTSIDE`.
            mapped: keys that stay in their files, and do not count.

        Returns:
            Bytes on the device.
        """
        left = {id(self._place(self._targets[key])[2]) for key in mapped}
        places = {id(tensor): (module, leaf, tensor) for module, leaf, tensor in self._places[part]}
        return sum(quantize.held(*place) for number, place in places.items() if number not in left)

    def arriving(self, part: int, device: str) -> int:
        """The most memory of a device while a part is loaded tensor by tensor, with what of it is
        there already.

        Args:
            part: the number of a block, or `OUTSIDE`.
            device: `cpu`, or the type of a GPU.

        Returns:
            Bytes.
        """
        assert self._loader is not None
        own, there, most = self._loader.quantizer.pre_quantized, 0, 0
        for target, keys in self._by_target(part).items():
            module, leaf, meta = self._place(target)
            result, dtype = quantize.held(module, leaf, meta), self.stored[keys[0]].dtype
            bits = quantize.quantized_bits(module) if leaf == "weight" else None
            if bits is not None:
                overhead = (
                    0
                    if own
                    else quantize.staging(bits, meta.numel(), dtype, self._model.dtype, device)
                )
            elif len(keys) > 1:
                overhead = 2 * result  # what is put together, in two steps
            else:
                overhead = self.stored[keys[0]].nbytes if dtype != meta.dtype else 0
            most = max(most, there + result + overhead)
            there += result
        return most

    def largest_on_host(self, part: int) -> int:
        """The host's memory through which a GPU's tensors come; LLM.int8() wants them back there
        once.

        Args:
            part: the number of a block, or `OUTSIDE`.

        Returns:
            Bytes of the largest tensor, as read and copied back.
        """
        assert self._loader is not None
        sizes = []
        for target, keys in self._by_target(part).items():
            module, leaf, meta = self._place(target)
            back = (
                leaf == "weight"
                and quantize.quantized_bits(module) == "8bit"
                and not self._loader.quantizer.pre_quantized
            )
            read = sum(self.stored[k].nbytes for k in keys)
            sizes.append(read + (meta.numel() * self._model.dtype.itemsize if back else 0))
        return max(sizes)

    def nbytes(self, part: int) -> int:
        """The size of a part's tensors on disk.

        Args:
            part: the number of a block, or `OUTSIDE`.

        Returns:
            Bytes.
        """
        return sum(self.stored[k].nbytes for k in self.keys[part])

    def converted_bytes(self, part: int) -> int:
        """What a part takes on top of its buffer: all of it where its precision or its layout is
        another on disk.

        Args:
            part: the number of a block, or `OUTSIDE`.

        Returns:
            Bytes.
        """
        wanted = sum(t.numel() * t.element_size() for t in self._meta(part))
        if part in self._converted:
            return wanted
        targets = (
            (self.stored[k].dtype, self._model.state_dict()[self._targets[k]])
            for k in self.keys[part]
        )
        return sum(t.numel() * t.element_size() for dtype, t in targets if dtype != t.dtype)

    def attach(self, part: int, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put a part's tensors into the model, in the model's precision.

        Args:
            part: the number of a block, or `OUTSIDE`.
            tensors: of the files, by key.
            device: that they are put on.

        Raises:
            ModelError: one is missing.
        """
        if part in self._converted:
            config = LoadStateDictConfig(
                weight_mapping=cast(Any, copy.deepcopy(self._mapping)),
                device_map={"": device},
                dtype=self._model.dtype,
                dtype_plan=self._model._get_dtype_plan(self._model.dtype),
            )
            convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        else:
            self.put(tensors, device)
        self._check_whole(part)
        if self.adapters is not None:
            self.adapters.merge({module for module, _, _ in self._places[part]})

    def _check_whole(self, part: int) -> None:
        missing = [f"{self._names[m]}.{leaf}" for m, leaf, t in self._now(part) if t.is_meta]
        if missing:
            raise ModelError(
                f"{type(self._model).__name__}: the files lack {len(missing)} weights "
                f"({missing[0]}, …); "
                "they are incomplete or of another architecture"
            )

    @property
    def quantized(self) -> bool:
        """Whether parts are quantised as they are loaded, or were before."""
        return self._loader is not None

    def load(
        self, part: int, tensors: Mapping[str, OnDisk], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Quantise a part's tensors; the model itself is left as it is.

        Args:
            part: the number of a block, or `OUTSIDE`.
            tensors: of the files, by key.
            device: that they are made on.

        Returns:
            The tensors by their names in the model.
        """
        assert self._loader is not None
        names = list(
            dict.fromkeys(
                f"{self._names[m]}.{leaf}".lstrip(".") for m, leaf, _ in self._places[part]
            )
        )
        return self._loader.load(tensors, names, device)

    def place(self, part: int, loaded: Mapping[str, torch.Tensor]) -> None:
        """Give a part what `load` made of it.

        Args:
            part: the number of a block, or `OUTSIDE`.
            loaded: tensors by their names in the model.

        Raises:
            ModelError: one is missing.
        """
        for name, tensor in loaded.items():
            module, leaf, _ = self._place(name)
            self._set_tied(module, leaf, tensor)
        self._check_whole(part)

    def put(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put some of the tensors of a part, none of them converted, into the model.

        Args:
            tensors: of the files, by key.
            device: that they are put on.
        """
        for key, tensor in tensors.items():
            self._put(self._targets[key], tensor, device)

    def detach(self, part: int) -> None:
        """Make a part meta again; its tensors are freed.

        Args:
            part: the number of a block, or `OUTSIDE`.
        """
        for module, leaf, tensor in self._places[part]:
            _set(module, leaf, tensor)
            if self._loader is not None:
                quantize.release(module)

    def target(self, key: str) -> str:
        """Find the parameter or buffer that a key goes to.

        Args:
            key: of the checkpoint.

        Returns:
            Its name in the model.
        """
        return self._targets[key]

    def is_converted(self, part: int) -> bool:
        """Whether a part's tensors are laid out anew on loading.

        Args:
            part: the number of a block, or `OUTSIDE`.

        Returns:
            True where the layout in the files is another one.
        """
        return part in self._converted

    def _put(self, target: str, tensor: torch.Tensor, device: torch.device) -> None:
        module, leaf, meta = self._place(target)
        if tuple(meta.shape) != tuple(tensor.shape):
            raise ModelError(
                f"{target}: the files have {tuple(tensor.shape)}, the config wants "
                f"{tuple(meta.shape)}"
            )
        value = tensor.to(device=device, dtype=meta.dtype)
        self._set_tied(
            module,
            leaf,
            nn.Parameter(value, requires_grad=False) if isinstance(meta, nn.Parameter) else value,
        )

    def _set_tied(self, module: nn.Module, leaf: str, new: torch.Tensor) -> None:
        meta = getattr(module, leaf)
        for other, other_leaf, tied in self._places[self._part_of.get(module, OUTSIDE)]:
            if tied is meta:
                _set(other, other_leaf, new)

    def _by_target(self, part: int) -> dict[str, list[str]]:
        """Keys by what they go to, in the order in which transformers loads them."""
        keys: dict[str, list[str]] = {}
        for key in sorted(self.keys[part], key=dot_natural_key):
            keys.setdefault(self._targets[key], []).append(key)
        return keys

    def _place(self, target: str) -> tuple[nn.Module, str, torch.Tensor]:
        """Where a target is: its module, its name there, and the tensor that is there."""
        path, _, leaf = target.rpartition(".")
        module = self._model.get_submodule(path)
        return module, leaf, getattr(module, leaf)

    def _keep_dtype(self, target: str, dtype: torch.dtype) -> None:
        """A weight of a quantised checkpoint that is not quantised stays as the file has it, as
        transformers does.
        """
        module, _, meta = self._place(target)
        if not quantize.quantized_bits(module):
            meta.data = meta.data.to(dtype)

    def _all_places(self) -> dict[int, list[tuple[nn.Module, str, torch.Tensor]]]:
        places: dict[int, list[tuple[nn.Module, str, torch.Tensor]]] = defaultdict(list)
        for module in self._model.modules():
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.is_meta:
                    places[self._part_of.get(module, OUTSIDE)].append((module, leaf, tensor))
        return places

    def _meta(self, part: int) -> list[torch.Tensor]:
        return list({id(t): t for _, _, t in self._places[part]}.values())

    def _now(self, part: int) -> list[tuple[nn.Module, str, torch.Tensor]]:
        return [(module, leaf, getattr(module, leaf)) for module, leaf, _ in self._places[part]]


def _set(module: nn.Module, leaf: str, tensor: Any) -> None:
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor
