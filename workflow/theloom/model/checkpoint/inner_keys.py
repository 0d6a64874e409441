"""Weights whose keys have one more part in the files of a model with a head than in its class
without one, where transformers itself does not take that part off.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from theloom.model.checkpoint.classes import model_class
from theloom.model.checkpoint.limits import bounded_build
from theloom.model.weight_format import quantization_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@contextmanager
def report_held_back() -> Iterator[None]:
    """Transformers does not print its table of keys within: `check_loaded` says what is in it."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)


def load_without_bytes(
    model_config: "PretrainedConfig", stored: Mapping[str, Any], mapping: Mapping[str, str]
) -> tuple[Any, Mapping[str, Any]]:
    """Load a model by the names and shapes of its files' tensors alone.

    Args:
        model_config: of the model.
        stored: the tensors of its files, which have a `shape`, by their keys.
        mapping: of keys, as `from_pretrained` takes it.

    Returns:
        The model on the meta device, and what `from_pretrained` says of its keys.
    """
    import torch

    empty = {key: torch.empty(t.shape, device="meta") for key, t in stored.items()}
    with bounded_build(), report_held_back():
        loaded: tuple[Any, Mapping[str, Any]] = model_class(model_config).from_pretrained(
            None,
            config=model_config,
            state_dict=empty,
            device_map={"": "meta"},
            key_mapping=dict(mapping),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return loaded


def without_inner_part(
    model_config: "PretrainedConfig", stored: Mapping[str, Any], mapping: Mapping[str, str]
) -> dict[str, str]:
    """Take a part off the keys of files that their class with a head wrote.

    It is tried on tensors without bytes: a part is taken off where weights are missing with it and
    fewer are without it. So DeepSeek-V4's `model.norm.weight` is found, which transformers takes
    for another norm, and InstructBLIP's `language_model.model.decoder`.

    Args:
        model_config: of the model.
        stored: the tensors of its files, by their keys.
        mapping: the other patterns of keys and what to call them.

    Returns:
        One pattern and what to call it; none where nothing is missing, or where no part explains
        it.
    """
    if not _may_differ(model_config, stored):
        return {}
    try:
        missing = _missing(model_config, stored, mapping)
        for part in _parts(missing, stored):
            less = _missing(model_config, stored, {**part, **mapping})
            if less < missing:
                return part
    except Exception:  # loading itself says what is wrong with the files
        return {}
    return {}


def _may_differ(model_config: "PretrainedConfig", stored: Mapping[str, Any]) -> bool:
    """Whether the files are of another class whose keys transformers converts, or do not have the
    prefix that it takes off.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if not stored or quantization_config(model_config):
        return False
    of_class = model_class(model_config)
    if of_class.__name__ in (model_config.architectures or (of_class.__name__,)):
        return False
    prefix = of_class.base_model_prefix
    if not prefix or not any(key.startswith(f"{prefix}.") for key in stored):
        return True
    return get_checkpoint_conversion_mapping(model_config.model_type) is not None


def _missing(
    model_config: "PretrainedConfig", stored: Mapping[str, Any], mapping: Mapping[str, str]
) -> set[str]:
    return set(load_without_bytes(model_config, stored, mapping)[1]["missing_keys"])


def _parts(missing: set[str], stored: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parts of keys without which they are those of missing weights, the most frequent first;
    as patterns.
    """
    found: Counter[tuple[str, str]] = Counter()
    for key in stored:
        parts = key.split(".")
        for number, part in enumerate(parts[:-1]):
            if not part.isdigit() and ".".join([*parts[:number], *parts[number + 1 :]]) in missing:
                found["".join(f"{p}." for p in parts[:number]), part] += 1
    return [{f"^{re.escape(f'{head}{part}.')}": head} for (head, part), _ in found.most_common(3)]
