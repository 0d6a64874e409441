"""The tokenizer of a dataset, and the text of each of its tokens."""

import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.config import frozen
from theloom.errors import TheLoomError
from theloom.model import files

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from theloom.dataset.reader import ActivationsReader


log = logging.getLogger(__name__)


def of(acts: "ActivationsReader") -> "PreTrainedTokenizerBase":
    """The tokenizer that a dataset was made with.

    Args:
        acts: the dataset; its attributes record the tokenizer and its revision.

    Raises:
        TheLoomError: the tokenizer is not available any more.
        KeyError: the file does not record one.
    """
    return _load(acts.attributes["config"], acts.attributes["tokenizer_revision"])


def _load(config: str, revision: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    recorded = json.loads(config)["tokens"]
    recorded["model"]["revision"] = _revision(revision)
    # keys that files of before do not have
    recorded["model"].setdefault("ignore_own_code", False)
    by_file = recorded["corpus"].get("tokenizer_from") == "file"
    settings = frozen.to_config(_with_home(recorded)).model
    source = files.describe_tokenizer(settings)
    if by_file:
        return PreTrainedTokenizerFast(tokenizer_file=str(source.folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(
        source.folder, gguf_file=source.gguf_file, trust_remote_code=settings.trust_remote_code
    )


def texts(acts: "ActivationsReader", input_ids: "Sequence[int] | np.ndarray") -> list[str]:
    """The text of each token by itself, leading space kept.

    Args:
        acts: the dataset that the tokens are of.
        input_ids: (tokens,).

    Returns:
        A text for each token; `#` and its number, after a warning, where the tokenizer is
        unavailable.
    """
    # by what the file records, so that the tokenizer is loaded once for all datasets made with it
    recorded = (acts.attributes.get(name, "null") for name in ("config", "tokenizer_revision"))
    decode = _decoder(*recorded)
    return [decode(int(i)) for i in input_ids]


@cache
def _decoder(config: str, revision: str) -> Any:
    try:
        tokenizer = _load(config, revision)
    except (TheLoomError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("tokens are shown by their numbers: the tokenizer is unavailable (%s)", error)
        return "#{}".format
    return cache(lambda number: tokenizer.decode([number], clean_up_tokenization_spaces=False))


def _revision(recorded: str) -> str | None:
    return None if recorded in ("null", "None") else recorded


def _with_home(value: Any) -> Any:
    """Recorded paths with the user's home, written as `~`, put back in."""
    if isinstance(value, dict):
        return {k: _with_home(v) for k, v in value.items()}
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return str(Path(value).expanduser())
    return value
