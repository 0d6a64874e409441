"""What is wrong with the weights of a model's files, in one line, in place of the table that transformers prints."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@contextmanager
def kept_back() -> Iterator[None]:
    """Within the context transformers does not print its table: `check` says what is in it."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)


def check(model: "nn.Module", info: Mapping[str, Any], source: str) -> None:
    """`info` is what `from_pretrained(…, output_loading_info=True, ignore_mismatched_sizes=True)` gives.

    Weights that have no place in the model are said: a head's, which no hook point reads, or others, with a warning.
    Raises ModelError where any of the model's weights is missing or has another shape.
    """
    name = type(model).__name__
    missing = [key for key in sorted(info["missing_keys"]) if not key.startswith("pooler.")]  # after all hook points
    if missing:
        raise ModelError(
            f"model.source: {source} lacks {len(missing)} weights of {name} ({missing[0]}, …); "
            "its files are incomplete or of another architecture"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, in_file, by_config = mismatched[0]
        raise ModelError(
            f"model.source: {source} has {len(mismatched)} weights of another shape than its config says ({key}: "
            f"{tuple(in_file)} in the files, {tuple(by_config)} by the config); they are not of one model"
        )
    prefix, parts = f"{getattr(model, 'base_model_prefix', '')}.", dict(model.named_children())
    of_head = {key: key.removeprefix(prefix).split(".")[0] not in parts for key in sorted(info["unexpected_keys"])}
    if heads := [key for key, head in of_head.items() if head]:
        log.info("not read, as no hook point needs them: %s", _few(heads))
    if others := [key for key, head in of_head.items() if not head]:
        words = "%d weights of the files have no place in %s, as its config has it, and are left out: %s"
        log.warning(words, len(others), name, _few(others))


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {names[-1]}"
