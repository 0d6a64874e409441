"""Where a model's files are: a hub id, a local folder, an installed package, a GGUF file in any of
them.

`prepare` ends with a local folder of safetensors, config and tokenizer. A GGUF file is converted to
such a folder once, in a cache that all runs share, so that every later job loads in a second.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from theloom.config import model_dims
from theloom.config.model_dims import ModelDims
from theloom.config.schema import ArchitectureConfig, ModelConfig
from theloom.errors import ModelError
from theloom.model.adapters.files import (
    AdapterFiles,
    base_of,
    find_adapters,
    local_adapters,
)
from theloom.model.checkpoint import folder as folders
from theloom.model.checkpoint import gguf, tokenizer_file
from theloom.model.checkpoint.conversion import conversion, converted
from theloom.model.checkpoint.sources import find_folder, local_folder
from theloom.model.towers import classes as towers
from theloom.rows.modality import SENSED

if TYPE_CHECKING:
    from transformers import PretrainedConfig


log = logging.getLogger(__name__)

# patterns of the names that transformers loads; repositories often hold others too
_SAFETENSORS = "model*.safetensors"
_PICKLES = "pytorch_model*.bin"


@dataclass(frozen=True)
class ModelFiles:
    """A local folder that `from_pretrained` loads, where it came from, the GGUF file that it was
    made from, and the adapters that are merged into it.
    """

    folder: Path
    source: str
    revision: str | None
    gguf_file: str | None = None
    adapters: tuple[AdapterFiles, ...] = ()  # in the order in which they are merged
    side: str | None = None  # the half of an encoder-decoder that is read
    modality: str | None = None  # images or audio instead of texts, or both as chat
    stages: tuple[str, ...] = ()  # the hook points in stages that are read

    def weight_files(self) -> list[Path]:
        """The files that decide what the model computes, adapters apart.

        Returns:
            Those that hold weights, those that say how to read them, the folder's own code and
            `config.json`, sorted by path.
        """
        weights = list(self.folder.glob(_SAFETENSORS)) or list(self.folder.glob(_PICKLES))
        described = [p for name in ("model*.index.json", "*.py") for p in self.folder.glob(name)]
        return sorted([*weights, *described, self.folder / "config.json"])


def prepare_files(
    config: ModelConfig,
    revision: str | None = None,
    adapter_revisions: Sequence[str | None] = (),
) -> ModelFiles:
    """Find the model's files, fetch them where they are a hub's, convert them where they are GGUF.

    Args:
        config: the `model` settings.
        revision: the commit that an earlier job found; None: the one that the settings name.
        adapter_revisions: the commits of the adapters that an earlier job found, in their order.

    Returns:
        A local folder that loads, and where it came from.

    Raises:
        ModelError: files are missing or broken, would not be used, or cannot be fetched.
    """
    folder, revision = find_folder(
        base_source(config), revision or config.revision, [*_weights(config), *_code(config)]
    )
    gguf = _check_folder(folder, config)
    adapters = tuple(find_adapters(config, adapter_revisions))
    if gguf is not None:
        folder = converted(gguf)
    name = None if gguf is None else gguf.name
    read = _side(config), _modality(config), tuple(config.stages)
    return ModelFiles(folder, config.source, revision, name, adapters, *read)


def base_source(config: ModelConfig) -> str:
    """The source of the weights: model.source, or the base model of one that is an adapter.

    Args:
        config: the `model` settings.

    Returns:
        A folder, a package or a name on the hub.

    Raises:
        ModelError: the adapter's base model is not known or not here.
    """
    return base_of(config.source) or config.source


def _weights(config: ModelConfig) -> list[str]:
    """Patterns of the files of a hub that hold weights."""
    if config.gguf_file:
        return [config.gguf_file]
    return [_SAFETENSORS, *[_PICKLES] * config.allow_pickle]


def _code(config: ModelConfig) -> list[str]:
    return ["*.py"] * config.trust_remote_code


def _check_folder(folder: Path, config: ModelConfig) -> Path | None:
    """The GGUF file of a folder, None where it has weights that load as they are. Raises ModelError
    for neither, and where files are broken or would not be used.
    """
    gguf = _gguf_file(folder, config)
    folders.check_description(folder, config)
    if gguf is None:
        if not folders.weight_files(folder, config):
            raise ModelError(_no_weights(folder, config))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.source: {config.source} has no config.json; give a folder of "
                "save_pretrained's"
            )
        folders.stored_tensors(folder, config)
    return gguf


@dataclass(frozen=True)
class Description:
    """The folder of a config and a tokenizer, the GGUF file if they are in one that is not
    converted, the commit.
    """

    folder: Path
    gguf_file: str | None
    revision: str | None


def describe(config: ModelConfig) -> Description:
    """Where the model's config and tokenizer are. Fetches no safetensors.

    Args:
        config: the `model` settings.

    Returns:
        Their folder, the GGUF file that has them where it is not converted yet, and the commit.

    Raises:
        ModelError: they are missing, broken or would not be used.
    """
    more = [config.gguf_file] if config.gguf_file else []
    folder, revision = find_folder(base_source(config), config.revision, [*more, *_code(config)])
    gguf = _gguf_file(folder, config)
    if gguf is None and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.source: {config.source} has no config.json; give a folder of save_pretrained's"
        )
    folders.check_description(folder, config)
    if gguf is not None and (converted := conversion(gguf)).is_dir():
        return Description(converted, None, revision)
    return Description(folder, gguf.name if gguf else None, revision)


def describe_tokenizer(config: ModelConfig) -> Description:
    """Where the tokenizer is: model.tokenizer's, else the model's own.

    Args:
        config: the `model` settings.

    Returns:
        Its folder, as of `describe`.

    Raises:
        ModelError: it is missing, broken or would not be used.
    """
    if config.tokenizer is None:
        found = describe(config)
    else:
        folder, revision = find_folder(config.tokenizer, None, _code(config), "model.tokenizer")
        found = Description(folder, None, revision)
    _check_tokenizer(found.folder, config)
    return found


def check_local(config: ModelConfig) -> None:
    """Check what can be told at once, without a network: folders, packages and files of a model,
    its adapters and its tokenizer.

    Args:
        config: the `model` settings.

    Raises:
        ModelError: one is not there, is broken or would not be used.
    """
    folder = local_folder(base_source(config))
    if folder is not None:
        _check_folder(folder, config)
    local_adapters(config)
    if not _has_tokens(config):
        return  # it has a processor, and no tokenizer
    if config.tokenizer is not None:
        folder = local_folder(config.tokenizer, "model.tokenizer")
    if folder is not None:
        _check_tokenizer(folder, config)


def _check_tokenizer(folder: Path, config: ModelConfig) -> None:
    folders.check_tokenizer(folder, config)
    key = "model.tokenizer" if config.tokenizer else "model.source"
    tokenizer_file.check(folder, f"{key}: {config.tokenizer or config.source}")


def local_weights(config: ModelConfig) -> Path | None:
    """The folder of a local model whose weights load as they are.

    Args:
        config: the `model` settings.

    Returns:
        The folder; None for a hub's model and for GGUF.

    Raises:
        ModelError: the folder, or a file of it, is missing or broken.
    """
    folder = local_folder(base_source(config))
    return folder if folder is not None and _check_folder(folder, config) is None else None


def is_gguf(config: ModelConfig) -> bool:
    """Whether a local model is a GGUF file that is not converted yet.

    Args:
        config: the `model` settings.

    Returns:
        True where it is; False for a hub's model.

    Raises:
        ModelError: the folder, or a file of it, is missing or broken.
    """
    folder = local_folder(base_source(config))
    gguf = _check_folder(folder, config) if folder is not None else None
    return gguf is not None and not conversion(gguf).is_dir()


def fetch(config: ModelConfig) -> str | None:
    """Have all files of a model, its adapters and its tokenizer here, fetched where they are a
    hub's. Converts nothing.

    Args:
        config: the `model` settings.

    Returns:
        The commit of the model; None where it is not from the hub.

    Raises:
        ModelError: files are missing or broken, would not be used, or cannot be fetched.
    """
    folder, revision = find_folder(
        base_source(config), config.revision, [*_weights(config), *_code(config)]
    )
    _check_folder(folder, config)
    find_adapters(config)
    if _has_tokens(config):
        describe_tokenizer(config)
    return revision


def _gguf_file(folder: Path, config: ModelConfig) -> Path | None:
    if config.gguf_file is not None:
        file = folder / config.gguf_file
        if not file.is_file():
            here = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
            raise ModelError(
                f"model.gguf_file: no {config.gguf_file!r} in {config.source}; GGUF files "
                f"there: {here}"
            )
        return _checked_gguf(file, config)
    found = sorted(folder.glob("*.gguf"))
    if not found or any(folder.glob(_SAFETENSORS)):
        return None
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ModelError(
            f"model.gguf_file: not set, and {config.source} has several GGUF files: {names}"
        )
    return _checked_gguf(found[0], config)


def _checked_gguf(file: Path, config: ModelConfig) -> Path:
    gguf.check(file, f"model.gguf_file: {config.source}")
    return file


def _no_weights(folder: Path, config: ModelConfig) -> str:
    pickles = sorted(p.name for p in folder.glob(_PICKLES))
    if pickles:
        return (
            f"model.source: {config.source} has no safetensors, only pickled weights "
            f"({pickles[0]}), which can run "
            "code; set model.allow_pickle=true if you trust them"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return (
            f"model.source: {config.source} has no {folders.SAFETENSORS} and no index of shards, "
            f"which transformers loads, only {others[0]}; fetch the other files too, or give it "
            "that name"
        )
    return (
        f"model.source: {config.source} has no safetensors and no GGUF file; give a folder or a "
        "hub id that has"
    )


def hf_config(config: ModelConfig) -> "PretrainedConfig":
    """The model's own config, read without its weights.

    Args:
        config: the `model` settings.

    Returns:
        As `AutoConfig` of transformers gives it.

    Raises:
        ModelError: it is missing or broken, or transformers does not know the model.
    """
    place, found = _described(config)
    found = towers.chosen(found, _modality(config), place.folder, config.source, _side(config))
    model_dims.mark_side(found, _side(config))
    model_dims.mark_stages(found, config.stages)
    return found


def reads(config: ModelConfig) -> str | None:
    """What a model reads, by its own config alone.

    Args:
        config: the `model` settings.

    Returns:
        `images` or `audio`; None for texts, and for models that compare texts to images or audio.

    Raises:
        ModelError: its config is missing or broken, or transformers does not know the model.
    """
    return towers.reads(_described(config)[1])


def sides(config: ModelConfig) -> tuple[str, ...]:
    """The halves that can be read of an encoder-decoder whose encoder reads no texts, by its own
    config alone.

    Args:
        config: the `model` settings.

    Returns:
        As `towers.sides_of`.

    Raises:
        ModelError: its config is missing or broken, or transformers does not know the model.
    """
    return towers.sides_of(_described(config)[1])


def _described(config: ModelConfig) -> "tuple[Description, PretrainedConfig]":
    """Where a model's own config is, and the config as it stands. Raises ModelError."""
    from transformers import AutoConfig

    place = describe(config)
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            place.folder, gguf_file=place.gguf_file, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # whatever transformers raises at a config is a fault of its values
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = (
                "transformers has no such model of its own; set model.trust_remote_code=true if "
                "you trust the code of its folder"
            )
        raise ModelError(f"model.source: {config.source}: {message}") from None
    return place, found


def config_in(files: ModelFiles, trust_remote_code: bool) -> "PretrainedConfig":
    """The config in a model's own folder (`prepare_files`).

    Args:
        files: of the model.
        trust_remote_code: whether code of that folder may run.

    Returns:
        As `AutoConfig` of transformers gives it.
    """
    from transformers import AutoConfig

    found: PretrainedConfig = AutoConfig.from_pretrained(
        files.folder, trust_remote_code=trust_remote_code
    )
    found = towers.chosen(found, files.modality, files.folder, files.source, files.side)
    model_dims.mark_side(found, files.side)
    model_dims.mark_stages(found, files.stages)
    return found


def _side(config: ModelConfig) -> str | None:
    return None if config.side is None else config.side.name


def _has_tokens(config: ModelConfig) -> bool:
    """Whether a run's rows are those of tokens: not of patches or frames."""
    return _modality(config) not in SENSED or _side(config) == "decoder"


def _modality(config: ModelConfig) -> str | None:
    return None if config.modality is None else config.modality.name


def read_config(config: ModelConfig) -> ModelDims:
    """The numbers of the model's own config.

    Args:
        config: the `model` settings.

    Returns:
        Its dimensions.

    Raises:
        ModelError: the config is missing or broken.
    """
    return model_dims.numbers(hf_config(config))


def check_architecture(
    declared: ArchitectureConfig | None, found: ModelDims, source_name: str
) -> None:
    """Check that the profile's numbers, by which memory was planned, are those of the model.

    Args:
        declared: `model.architecture` of the profile; None: there is nothing to check.
        found: the numbers of the model's own config.
        source_name: `model.source`, for messages.

    Raises:
        ModelError: a number is another one.
    """
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
                f"model.architecture.{name}: the profile says {planned}, the config of "
                f"{source_name} says {value}; "
                "use profiles=custom for a model of your own, or set model.architecture=null"
            )
