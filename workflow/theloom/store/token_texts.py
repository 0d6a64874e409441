"""The texts of the tokens that a file has, by their ids: no reader needs a tokenizer to show them,
which a file of a stranger could name.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import h5py
import numpy as np

from theloom.store.file_format import are_offsets

GROUP = "vocabulary"


def write(file: h5py.File, texts: Mapping[int, str]) -> None:
    """Write the datasets `vocabulary/{id,offset,text}` of an open file.

    Args:
        file: the file.
        texts: the text of each token id that occurs in it.
    """
    ids = sorted(texts)
    encoded = [texts[number].encode(errors="replace") for number in ids]
    file[f"{GROUP}/id"] = np.array(ids, "<i4")
    file[f"{GROUP}/offset"] = np.cumsum([0, *map(len, encoded)]).astype("<i8")
    file[f"{GROUP}/text"] = np.frombuffer(b"".join(encoded), "u1")


def read(
    array: Callable[[str], np.ndarray], known: Mapping[int, str] | None = None
) -> dict[int, str]:
    """Read what `write` wrote.

    Args:
        array: returns the content of a dataset by its name.
        known: texts that are not read again.

    Returns:
        The text of each token id that is not known.

    Raises:
        ValueError: the table is damaged.
    """
    ids, offset = array(f"{GROUP}/id"), array(f"{GROUP}/offset")
    text = array(f"{GROUP}/text").tobytes()
    if not are_offsets(offset, len(ids), len(text)):
        raise ValueError("its table of token texts is damaged")
    pairs = zip(ids.tolist(), pairwise(offset.tolist()), strict=True)
    return {
        number: text[begin:end].decode()
        for number, (begin, end) in pairs
        if known is None or number not in known
    }
