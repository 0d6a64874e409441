"""Frozen configs: the keys on which each stage depends, written for its jobs and read by them."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from theloom.config import schema
from theloom.config.schema import Config


@dataclass(frozen=True)
class Stage:
    """The keys (or whole sections) on which a stage depends.

    `revision` is raised when the stage's code gives another result for the same config, so that
    finished runs are redone where that matters, and nowhere else.
    """

    keys: tuple[str, ...]
    revision: int = 1


# Keys that change what a job leaves beside its result, and nothing in the result. They are frozen
# only where they are set, so that the config of a run without them is what it was before they
# existed; elsewhere they read as null.
BESIDE_THE_RESULT = ("memory.profile_shard", "store.max_overflow", "store.allow_nonfinite")

# Keys that are frozen only where they are set, though they change the result: runs without them
# stay what they were before the keys existed.
WHERE_SET = (
    "model.adapter",
    "model.side",
    "model.modality",
    "model.stages",
    "corpus.target",
    "corpus.images",
)

# A section that is frozen only where its `source` is set: runs without it stay what they were.
ANSWERS = "answers"

# Keys of the plan by which a shard is cut into passes: they change its rows by rounding alone.
# Jobs read them from estimate.h5, so that another plan leaves finished and unfinished shards alone.
_PLAN = (
    "memory.streaming_chunk_size",
    "memory.memory_warning_threshold",
    "extraction.batch_tokens",
    "extraction.cache",
    "answers.batch",
)


def decides_no_row(key: str) -> bool:
    """Whether a run has the same rows, but for rounding, whatever a key says.

    Args:
        key: The dotted name of a key.

    Returns:
        True for how a run is computed and planned; False for what decides its rows.

    Examples:
        >>> decides_no_row("extraction.batch_tokens"), decides_no_row("memory.precision_mode")
        (True, False)
    """
    beside = (*_PLAN, *BESIDE_THE_RESULT, "verify.jobs", "store.remote", "store.keep_local")
    return key in beside or key.startswith("resources.")


_MODEL_FILES = (
    "model.source",
    "model.revision",
    "model.gguf_file",
    "model.allow_pickle",
    "model.trust_remote_code",
    "model.ignore_own_code",
    "model.side",
    "model.modality",
    "model.stages",
)

_LOADING = (
    *_MODEL_FILES,
    "model.adapter",
    "memory.precision_mode",
    "memory.quantization",
    "extraction.device",
    "extraction.attention",
    "extraction.execution",
)

_MEMORY = (
    "memory.precision_mode",
    "memory.quantization",
    "memory.enable_gradient_checkpointing",
    "memory.streaming_chunk_size",
    "memory.memory_warning_threshold",
    "memory.activation_cache_filter",
)

# What decides which answers there are
_ANSWERS = tuple(
    key.name
    for key in schema.leaf_keys()
    if key.name.startswith(f"{ANSWERS}.") and key.name not in _PLAN
)

STAGES: dict[str, Stage] = {
    "estimate": Stage(
        (
            "model",
            *_MEMORY,
            "extraction",
            "store.dtype",
            "corpus.max_documents",
            "corpus.max_tokens",
            "corpus.context_length",
            "corpus.input_ids",
            "corpus.messages",
            "rows",
            "answers",
        )
    ),
    "model": Stage(
        (
            *_LOADING,
            "model.architecture",
            "memory.enable_gradient_checkpointing",
        )
    ),
    "tokens": Stage(
        (*_MODEL_FILES, "model.tokenizer", "corpus", "rows", "extraction.shards", *_ANSWERS)
    ),
    "sample": Stage(
        (
            *_LOADING,
            "model.tokenizer",
            "corpus.tokenizer_from",
            "corpus.add_special_tokens",
            "extraction.shards",
            *_ANSWERS,
        )
    ),
    "answers": Stage(
        (*_MODEL_FILES, "model.tokenizer", "corpus", "rows", "extraction.shards", *_ANSWERS)
    ),
    "extract": Stage(
        (
            *_LOADING,
            "memory.activation_cache_filter",
            "extraction.shards",
            "store.dtype",
            "store.compression",
            "rows",
            *BESIDE_THE_RESULT,
        )
    ),
    "merge": Stage(("store.merge", "extraction.shards")),
    "verify": Stage(
        (
            *_LOADING,
            "verify.documents",
            "verify.tolerance",
            "verify.seed",
            "verify.compare_to_fp32",
        )
    ),
    "source": Stage(
        (
            *_MODEL_FILES,
            "model.adapter",
            "model.tokenizer",
            "corpus.kind",
            "corpus.dataset",
            "corpus.subset",
            "corpus.split",
            "corpus.streaming",
        )
    ),
    "push": Stage(("store.remote",)),
    "remove": Stage(("store.remote", "store.keep_local")),
    "report": Stage(("report",)),
    "resources": Stage(("resources", "verify.jobs")),
}


def frozen_keys(stage: str, answered: bool) -> tuple[str, ...]:
    """The keys on which a stage depends, of a run with answers or without.

    Args:
        stage: Its name in `STAGES`.
        answered: Whether the run has answers to its documents.

    Returns:
        The dotted names of the keys.

    Examples:
        >>> "rows" in frozen_keys("tokens", answered=False), "rows" in frozen_keys("tokens", True)
        (True, False)
    """
    keys = STAGES[stage].keys
    if not answered:
        return tuple(key for key in keys if key.partition(".")[0] != ANSWERS)
    # which rows are kept is decided once the answers are there, and is no reason to sample again
    return tuple(key for key in keys if (stage, key) != ("tokens", "rows"))


def freeze(stage_config: dict[str, Any], path: Path) -> None:
    """Write the frozen config of a stage (`Run.stage`) as JSON.

    Args:
        stage_config: Plain data, of `Run.stage`.
        path: The file, which is replaced.
    """
    path.write_text(_as_json(stage_config), encoding="utf-8")


def _as_json(stage_config: dict[str, Any]) -> str:
    return json.dumps(stage_config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def load_frozen(path: str | Path) -> Config:
    """Read the frozen config of a stage.

    Args:
        path: A file that `freeze` wrote.

    Returns:
        The config, read-only; a key that is not in the file raises when it is read.
    """
    return _of_text(Path(path).read_text(encoding="utf-8"))


@lru_cache(maxsize=32)
def _of_text(text: str) -> Config:
    """The config of a file's text; it is read-only, so that all who read the same share it."""
    return to_config(json.loads(text)["config"])


def to_config(plain: dict[str, Any]) -> Config:
    """Plain data as a `Config`.

    Args:
        plain: Nested dicts of the keys, without those on which the stage does not depend.

    Returns:
        The config, read-only; a key that is not in the data raises when it is read.
    """
    config = cast(DictConfig, OmegaConf.merge(_nothing_known(), literal(plain)))
    OmegaConf.set_readonly(config, True)
    return cast(Config, config)


@cache
def _nothing_known() -> DictConfig:
    """A config whose keys raise when they are read, but for those that have a default here."""
    config = OmegaConf.structured(Config)
    for key in schema.leaf_keys():
        known = (*BESIDE_THE_RESULT, *WHERE_SET)
        if key.name not in known and key.name.partition(".")[0] != ANSWERS:
            OmegaConf.update(config, re.sub(r"(architecture)\..*", r"\1", key.name), "???")
    return cast(DictConfig, config)


def literal(data: Any) -> Any:
    """Plain data whose texts OmegaConf takes as they are: `${` begins no interpolation.

    Args:
        data: Nested dicts, lists and values.

    Returns:
        A copy of the data, with `${` escaped in its texts.

    Examples:
        >>> print(literal({"path": "/x/${y}"})["path"])
        /x/\\${y}
    """
    if isinstance(data, dict):
        return {key: literal(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [literal(value) for value in data]
    if not isinstance(data, str) or "${" not in data:
        return data
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", data)


def to_plain(config: Config) -> dict[str, Any]:
    """The keys that a stage's config holds and its result depends on, as plain data: the inverse of
    `to_config`.

    Args:
        config: Of a stage.

    Returns:
        Nested dicts, lists and values; without the keys that decide no result
        (`BESIDE_THE_RESULT`).
    """
    return _held(
        _decisive(OmegaConf.to_container(cast(Any, config), resolve=True, enum_to_str=True))
    )


def _held(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    held = {key: _held(value) for key, value in data.items() if value != "???"}
    return {key: value for key, value in held.items() if value != {}}


def without_unset(data: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys of `WHERE_SET` that are empty.

    Args:
        data: Nested dicts of the keys.

    Returns:
        A copy of what changes; the rest is shared.
    """
    kept = dict(data)
    for key in WHERE_SET:
        section, _, leaf = key.partition(".")
        if section in kept and not kept[section].get(leaf, True):
            kept[section] = {k: v for k, v in kept[section].items() if k != leaf}
    return kept


def _decisive(data: Any) -> Any:
    """Take out of a config, as plain data, the keys on which no result depends."""
    data = without_unset(data)
    for key in BESIDE_THE_RESULT:
        section, _, leaf = key.partition(".")
        data.get(section, {}).pop(leaf, None)
    if data.get(ANSWERS, {}).get("source") is None:
        data.pop(ANSWERS, None)
    return data


def frozen_digest(path: str | Path) -> str:
    """SHA-256 of a frozen config, of what the stage's result depends on: to tell which config made
    a file.

    Args:
        path: A file that `freeze` wrote.

    Returns:
        64 hexadecimal digits; the run's name does not change them.
    """
    frozen = json.loads(Path(path).read_text(encoding="utf-8"))
    frozen["config"] = _decisive(frozen["config"])
    frozen.pop("run", None)  # a name decides no row
    return hashlib.sha256(_as_json(frozen).encode()).hexdigest()
