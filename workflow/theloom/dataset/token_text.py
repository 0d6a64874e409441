"""The text of each token of a dataset: as its file has it, or by a tokenizer that the reader names.

Nothing in a file decides which tokenizer is loaded: it may be a stranger's.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from theloom.config.schema import ModelConfig
from theloom.errors import ModelError
from theloom.model import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from theloom.dataset.reader import ActivationsReader


log = logging.getLogger(__name__)


def load(name: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        name: its folder, or its name on the Hugging Face hub.
        trust_remote_code: run Python code that comes with it.

    Returns:
        The tokenizer, as `AutoTokenizer` makes it.

    Raises:
        ModelError: it is unavailable, or needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    place = files.describe_tokenizer(ModelConfig(source=name, trust_remote_code=trust_remote_code))
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place.folder, gguf_file=place.gguf_file, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever libraries raise at files is a fault of theirs
        message = " ".join(str(error).split())
        if "trust_remote_code" in message:
            message = "it needs its own code; give trust_remote_code=True if you trust it"
        raise ModelError(f"tokenizer {name}: {message}") from None
    return found


def texts(
    acts: "ActivationsReader",
    input_ids: "Sequence[int] | np.ndarray",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """The text of each token by itself, leading space kept.

    Args:
        acts: the dataset that the tokens are of.
        input_ids: (tokens,); of codes (tokens, codebooks).
        tokenizer: folder, or name on the hub, of a tokenizer that gives the texts; None: the file
            has them itself.
        trust_remote_code: run Python code that comes with that tokenizer.

    Returns:
        A text for each token; `#` and its number, after a warning, where the file has none; of
        codes their numbers.

    Raises:
        ModelError: the tokenizer is unavailable.
        StoreError: the file is damaged.
    """
    if acts.codebooks:
        return [" ".join(map(str, codes)) for codes in np.asarray(input_ids).tolist()]
    if tokenizer is not None:
        decode = _decoder(tokenizer, trust_remote_code)
        return [decode(int(number)) for number in input_ids]
    known = acts.token_texts
    found = [known.get(int(number)) for number in input_ids]
    if None in found:
        log.warning(
            "tokens are shown by their numbers where %s has no text of them; name its tokenizer: "
            "to_dataframe('tokens', tokenizer=...)",
            acts.path,
        )
    pairs = zip(found, input_ids, strict=True)
    return [f"#{number}" if text is None else text for text, number in pairs]


@cache
def _decoder(name: str, trust_remote_code: bool) -> Callable[[int], str]:
    tokenizer = load(name, trust_remote_code)

    @cache
    def decode(number: int) -> str:
        return str(tokenizer.decode([number], clean_up_tokenization_spaces=False))

    return decode
