"""What lies in a model's folder, checked before anything is loaded.

Files that are broken, and files that change the model and are not used, are errors that name them.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model.checkpoint.limits import check_config

_Read = TypeVar("_Read")

SAFETENSORS = "model.safetensors"
PICKLES = "pytorch_model.bin"

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_LFS = b"version https://git-lfs"


class StoredTensor(NamedTuple):
    """The type of a stored tensor, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path, what: str = "model.source") -> dict[str, Any]:
    """The object in a JSON file of a model.

    Args:
        file: its path.
        what: how the message of an error begins.

    Returns:
        The values by key.

    Raises:
        ModelError: the file cannot be read, is no JSON, or holds no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{what}: {file.name} {_broken(file, error)}") from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{what}: {file.name} holds {type(found).__name__}, not an object; fetch it again"
        )
    return found


def check_description(folder: Path, config: ModelConfig) -> None:
    """Check the parts of a folder that say which model it is.

    Args:
        folder: of the model.
        config: the `model` settings.

    Raises:
        ModelError: `config.json` is broken; or an adapter, a quantisation or code of the folder's
            own would change the model, and is not used.
    """
    where = f"model.source: {config.source}"
    if adapter := next((name for name in _ADAPTERS if (folder / name).exists()), None):
        raise ModelError(
            f"{where} has an adapter ({adapter}) next to the model, which is not applied; move the "
            "adapter's files to a folder of their own and set model.adapter to it, or remove them "
            "to take the model alone"
        )
    file = folder / "config.json"
    if not file.is_file():
        return
    described = read_json(file, where)
    check_config(described, where)
    if "compression_config" in described:
        raise ModelError(
            f"{where}: its weights are compressed (compression_config in config.json); take the "
            "uncompressed weights"
        )
    if "quantization_config" not in described:
        for name in _QUANTIZATION:
            if (folder / name).is_file():
                raise ModelError(
                    f"{where} has a {name}, and its config.json has no quantization_config: "
                    "transformers would take quantised weights for plain ones; take the "
                    "unquantised weights, or remove the file if they are"
                )
    if "transformers_weights" in described:
        raise ModelError(
            f"{where}: transformers_weights in config.json names other weights than {SAFETENSORS}; "
            "remove it, and give them that name"
        )
    check_own_code(own_model_code(described), config, where, "the model")


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Check that the tokenizer of a folder is code of transformers, or may run.

    Args:
        folder: of the tokenizer.
        config: the `model` settings.

    Raises:
        ModelError: it is code of its own, and the settings do not say what to do with it.
    """
    key = "model.tokenizer" if config.tokenizer else "model.source"
    where = f"{key}: {config.tokenizer or config.source}"
    files = [folder / "tokenizer_config.json", folder / "config.json"]
    for described in (read_json(file, where) for file in files if file.is_file()):
        entry = _auto_map(described).get("AutoTokenizer")
        named = [name for name in (entry if isinstance(entry, list) else [entry]) if name]
        check_own_code(
            {"AutoTokenizer": str(named[0])} if named else {}, config, where, "the tokenizer"
        )
        if named or "tokenizer_class" in described:
            return


def own_model_code(described: Mapping[str, Any]) -> dict[str, str]:
    """The folder's own classes of the config and the model, by the Auto class that they stand for.

    Args:
        described: the content of `config.json`.

    Returns:
        Auto classes, and the folder's classes in place of them.

    Examples:
        >>> own_model_code({"auto_map": {"AutoModel": "own.Own", "AutoTokenizer": "own.Tok"}})
        {'AutoModel': 'own.Own'}
    """
    return {
        name: str(value)
        for name, value in _auto_map(described).items()
        if value and (name == "AutoConfig" or name.startswith("AutoModel"))
    }


def check_own_code(own: Mapping[str, str], config: ModelConfig, where: str, what: str) -> None:
    """Check that code that a folder brings along may run, or is left out on request.

    Args:
        own: the folder's own classes, by the Auto class that they stand for.
        config: the `model` settings.
        where: how the message of an error begins: the setting and its value.
        what: what the code is of, such as `the model`.

    Raises:
        ModelError: the settings ask for both, or there is such code and they ask for neither.
    """
    if config.trust_remote_code and config.ignore_own_code:
        raise ModelError(
            "model.trust_remote_code runs a folder's own code, and model.ignore_own_code leaves it "
            "out; set one of them"
        )
    if own and not (config.trust_remote_code or config.ignore_own_code):
        name, value = next(iter(own.items()))
        raise ModelError(
            f"{where}: {what} is Python code of its own ({name}: {value}); set "
            "model.trust_remote_code=true if you trust it, or model.ignore_own_code=true to take "
            "the class of transformers instead, where it has the same"
        )


def _auto_map(described: Mapping[str, Any]) -> Mapping[str, Any]:
    found = described.get("auto_map") or {}
    return found if isinstance(found, dict) else {"AutoTokenizer": found}


def weight_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The files whose weights transformers loads.

    Args:
        folder: of the model.
        config: the `model` settings.

    Returns:
        Paths; none where transformers finds none.

    Raises:
        ModelError: the index is broken, or a file that it names is missing.
    """
    for single in (SAFETENSORS, PICKLES)[: 1 + config.allow_pickle]:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index, f"model.source: {config.source}")
    return []


def _shards(index: Path, where: str) -> list[Path]:
    names = read_json(index, where).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{where}: {index.name} has no weight_map; fetch it again")
    if wrong := [n for n in names.values() if not isinstance(n, str) or Path(n).name != n]:
        raise ModelError(
            f"{where}: {index.name} names {wrong[0]!r}, which is no file of the folder"
        )
    files = [index.parent / name for name in sorted(set(names.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{where} lacks {len(missing)} of {len(files)} weight files ({missing[0]}, …), which "
            f"{index.name} names; fetch them"
        )
    return files


def stored_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the safetensors that transformers loads. Reads the headers alone.

    Args:
        folder: of the model.
        config: the `model` settings.

    Returns:
        Type and shape of each, by its key; none of other files.

    Raises:
        ModelError: a file is broken.
    """
    where, found = f"model.source: {config.source}", {}
    for file in weight_files(folder, config):
        if file.suffix == ".safetensors":
            found.update(safetensors_header(file, where))
        else:
            _check_pickle(file, where)
    return found


def until_changed(read: Callable[[Path, str], _Read]) -> Callable[[Path, str], _Read]:
    """Keep what a function finds in a file as long as the file has the same size and time.

    Args:
        read: takes a file, and how the message of an error begins.

    Returns:
        A function of the same arguments, which calls `read` once for each state of a file.
    """

    @cache
    def kept(file: Path, where: str, size: int, time: int) -> _Read:
        return read(file, where)

    @wraps(read)
    def found(file: Path, where: str) -> _Read:
        stat = file.stat()
        return kept(file, where, stat.st_size, stat.st_mtime_ns)

    return found


@until_changed
def safetensors_header(file: Path, where: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone.

    Args:
        file: its path.
        where: how the message of an error begins.

    Returns:
        Type and shape of each, by its key.

    Raises:
        ModelError: the file is broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {k: StoredTensor(s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{where}: {file.name} {_broken(file, error)}") from None


def _check_pickle(file: Path, where: str) -> None:
    """A pickle of torch is a zip archive, or begins with the mark of a pickle."""
    with file.open("rb") as f:
        start = f.read(2)
    if not (zipfile.is_zipfile(file) if start == b"PK" else start[:1] == b"\x80"):
        raise ModelError(f"{where}: {file.name} {_broken(file, 'no pickle of torch')}")


def _broken(file: Path, error: object) -> str:
    """What is wrong with a file, as the end of a sentence about it, and what to do."""
    try:
        with file.open("rb") as f:
            start = f.read(len(_LFS))
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
    if not start:
        return "is empty; fetch it again"
    if start == _LFS:
        return "is a pointer of git-lfs, not the file; run `git lfs pull` in the folder"
    words = " ".join(str(error).split())
    return f"is damaged or cut short, {file.stat().st_size:,} bytes ({words}); fetch it again"
