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

    from theloom.dataset.activations import Activations


log = logging.getLogger(__name__)


def of(acts: "Activations") -> "PreTrainedTokenizerBase":
    """The tokenizer of a dataset, at its recorded revision. Raises TheLoomError where it is gone."""
    from transformers import AutoTokenizer

    recorded = json.loads(acts.attributes["config"])["tokens"]
    recorded["model"]["revision"] = _revision(acts.attributes["tokenizer_revision"])
    thawed = frozen.to_config(_with_home(recorded))
    place = files.describe_tokenizer(thawed.model)
    return AutoTokenizer.from_pretrained(
        place.folder, gguf_file=place.gguf_file, trust_remote_code=thawed.model.trust_remote_code
    )


def texts(acts: "Activations", input_ids: "Sequence[int] | np.ndarray") -> list[str]:
    """The text of each token by itself, leading space kept; `#` and its number where the tokenizer
    is unavailable.
    """
    decode = _decoder(acts.path, str(acts.attributes.get("run_fingerprint")))
    return [decode(int(i)) for i in input_ids]


@cache
def _decoder(path: Path, identity: str) -> Any:
    from theloom.dataset import activations

    try:
        tokenizer = of(activations.open_activations(path))
    except (TheLoomError, OSError, KeyError, ValueError) as error:
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
