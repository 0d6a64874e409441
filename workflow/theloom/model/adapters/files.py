"""Where an adapter's files are, and whether it is of a kind that is merged.

An adapter is a folder as PEFT's `save_pretrained` writes it: `adapter_config.json`, and the weights
in `adapter_model.safetensors`. Nothing here imports peft.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.checkpoint.folder import StoredTensor, read_json, safetensors_header
from theloom.model.checkpoint.sources import find_folder, local_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
KEY = "model.adapter"

MERGED = (
    "LORA",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "ROAD",
    "TRAINABLE_TOKENS",
    "WAVEFT",
)
"""PEFT's kinds whose merged weights are shown to be those of `merge_and_unload`."""

_PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)

# Initialisations of LoRA that leave the base model as it is. Others (PiSSA, OLoRA, CorDA, LoftQ)
# take a part out of its weights, which depends on the machine that trained.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys of LoRA's config that make another model than one with other weights.
_OTHER_MODELS = ("layer_replication", "alora_invocation_tokens", "megatron_config")


@dataclass(frozen=True)
class AdapterFiles:
    """A folder of PEFT's, where it came from, and what its config says.

    Attributes:
        folder: The local folder.
        source: As the config has it, without the revision.
        revision: The commit of a hub's adapter.
        kind: PEFT's name of the method, such as LORA.
        base: The model on which it was trained, as it says.
    """

    folder: Path
    source: str
    revision: str | None
    kind: str
    base: str | None

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        file = self.folder / WEIGHTS
        return file if file.is_file() else self.folder / PICKLE

    @property
    def files(self) -> list[Path]:
        """The files that decide what it does to a model."""
        return [self.folder / CONFIG, self.weights]


def base_of(source: str) -> str | None:
    """Find the base model of a source that is a local folder of an adapter alone.

    Args:
        source: `model.source`.

    Returns:
        The base model's source; None for other sources.

    Raises:
        ModelError: The adapter does not say which model it is of.
    """
    if source.startswith("package:"):
        return None
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(folder / CONFIG, f"model.source: {source}").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"model.source: {source} is an adapter without base_model_name_or_path; set "
            f"model.source to its base model, and {KEY}={source}"
        )
    if Path(base).expanduser().is_dir() or not base.startswith(("/", ".", "~")):
        return base
    raise ModelError(
        f"model.source: {source} is an adapter of {base}, which is no folder here; set "
        f"model.source to its base model, and {KEY}={source}"
    )


def requested(config: ModelConfig) -> list[str]:
    """Name the adapters of a model.

    Args:
        config: Of the model.

    Returns:
        `source` or `source@revision` of each, in the order in which they are merged.
    """
    named = [str(name) for name in config.adapter]
    return [config.source, *named] if base_of(config.source) is not None else named


def local_adapters(config: ModelConfig) -> list[AdapterFiles]:
    """Find the adapters that are local folders. Fetches nothing.

    Args:
        config: Of the model.

    Returns:
        Their files, in the order in which they are merged.

    Raises:
        ModelError: One is broken.
    """
    found = []
    for name in requested(config):
        source, revision = _split(name)
        if local_folder(source, KEY) is not None:
            found.append(_found(source, revision, config))
    return found


def find_adapters(config: ModelConfig, revisions: Sequence[str | None] = ()) -> list[AdapterFiles]:
    """All adapters of a model, fetched where they are a hub's.

    Args:
        config: The model's config.
        revisions: The commits that an earlier job found.

    Returns:
        Their files, in the order in which they are merged.

    Raises:
        ModelError: An adapter is missing, broken or of a kind that is not merged, or peft is not
            installed.
    """
    found = []
    for number, name in enumerate(requested(config)):
        source, revision = _split(name)
        pinned = revisions[number] if number < len(revisions) else None
        found.append(_found(source, pinned or revision, config))
    return found


def _split(name: str) -> tuple[str, str | None]:
    """Source and revision of `source[@revision]`; a folder whose name has an @ is a folder."""
    source, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        return name, None
    if not source or not revision:
        raise ModelError(f"{KEY}: {name!r} has nothing on one side of the @; write source@revision")
    if Path(source).expanduser().is_dir():
        raise ModelError(
            f"{KEY}: {source} is a local folder, and has no revision {revision!r}; take it "
            "out, or give a hub id"
        )
    return source, revision


def _found(source: str, revision: str | None, config: ModelConfig) -> AdapterFiles:
    weights = [WEIGHTS, *[PICKLE] * config.allow_pickle]
    folder, commit = find_folder(source, revision, weights, KEY)
    where = f"{KEY}: {source}"
    if not (folder / CONFIG).is_file():
        what = "a whole model: give it as model.source" if _is_model(folder) else "no adapter"
        raise ModelError(f"{where} has no {CONFIG}; it is {what}")
    described = read_json(folder / CONFIG, where)
    _check(described, where)
    if not (folder / WEIGHTS).is_file():
        _check_pickle(folder, where, config)
    base = described.get("base_model_name_or_path")
    kind = str(described.get("peft_type"))
    found = AdapterFiles(folder, source, commit, kind, base if isinstance(base, str) else None)
    if found.weights.name == WEIGHTS:
        stored(found)
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{KEY} needs peft; pip install 'theloom[adapters]'")
    return found


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _check_pickle(folder: Path, where: str, config: ModelConfig) -> None:
    if not (folder / PICKLE).is_file():
        raise ModelError(f"{where} has no {WEIGHTS}; fetch it")
    if not config.allow_pickle:
        raise ModelError(
            f"{where} has only pickled weights ({PICKLE}), which can run code; set "
            "model.allow_pickle=true if you trust them"
        )


def _check(described: dict[str, Any], where: str) -> None:
    """Whether an adapter can be merged, as far as its config says. Raises ModelError."""
    kind = described.get("peft_type")
    if kind in _PROMPTS:
        raise ModelError(
            f"{where} is of the kind {kind}, which adds prompts or layers and changes no weights: "
            "it cannot be merged; give an adapter such as LoRA, or none"
        )
    if kind not in MERGED:
        raise ModelError(
            f"{where} is of the kind {kind}, which is not merged here; merge it with peft "
            "(merge_and_unload, save_pretrained), and give that folder as model.source (merged "
            f"here: {', '.join(MERGED)})"
        )
    start = described.get("init_lora_weights")
    if kind == "LORA" and start not in _PLAIN_STARTS:
        raise ModelError(
            f"{where} was trained from init_lora_weights={start!r}, which changes the base model's "
            "weights; convert it with peft (path_initial_model_for_weight_conversion), or merge it "
            "where it was trained"
        )
    for name in _OTHER_MODELS:
        if described.get(name):
            raise ModelError(
                f"{where} has {name}, which is more than other weights: it cannot be merged; give "
                "an adapter without"
            )


def stored(files: AdapterFiles) -> dict[str, StoredTensor]:
    """Read what an adapter's safetensors hold; no tensor is read.

    Args:
        files: Of the adapter.

    Returns:
        Type and shape of each tensor by its name; empty for a pickle.

    Raises:
        ModelError: The file is broken.
    """
    if files.weights.name != WEIGHTS:
        return {}
    return safetensors_header(files.weights, f"{KEY}: {files.source}")


def merging_bytes(adapters: Sequence[AdapterFiles], largest_weight: int) -> int:
    """Bytes that merging takes on top of the model while it is loaded.

    Args:
        adapters: As they are found.
        largest_weight: Elements of the largest weight of the model, for kinds that do not tell how
            large the weights are that they change.

    Returns:
        All adapters in FP32, and twice the largest weight that is changed, in FP32: what is added
        to it, and a copy.
    """
    changed = max((_largest_change(files) or largest_weight for files in adapters), default=0)
    return sum(held_bytes(files) for files in adapters) + 8 * changed


def _largest_change(files: AdapterFiles) -> int | None:
    """Elements of the largest weight that LoRA changes: the rows of B times the columns of A."""
    shapes = {key: tensor.shape for key, tensor in stored(files).items()}
    sizes = [
        shape[-1] * shapes[other][0]
        for key, shape in shapes.items()
        if "lora_" in key and (other := key.replace("_A", "_B")) in shapes and other != key
    ]
    return max(sizes, default=None)


def held_bytes(files: AdapterFiles) -> int:
    """The size of an adapter's tensors in FP32, as peft has them.

    Args:
        files: Of the adapter.

    Returns:
        Bytes; of a pickle those of the file.
    """
    if files.weights.name != WEIGHTS:
        return files.weights.stat().st_size
    return sum(4 * math.prod(tensor.shape) for tensor in stored(files).values())
