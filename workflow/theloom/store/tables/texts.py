"""Lists of texts of any length, in two datasets: all bytes, and where each text begins."""

from collections.abc import Sequence
from itertools import pairwise

import h5py
import numpy as np

from theloom.store.file_format import are_offsets


def write(file: h5py.File, name: str, texts: Sequence[str]) -> None:
    """Write the datasets `<name>` and `<name>_offset`.

    Args:
        file: an open file.
        name: of the dataset of bytes.
        texts: the texts.
    """
    encoded = [text.encode(errors="replace") for text in texts]
    file[f"{name}_offset"] = np.cumsum([0, *map(len, encoded)]).astype("<i8")
    file[name] = np.frombuffer(b"".join(encoded), "u1")


def read(file: h5py.File, name: str) -> list[str]:
    """Read what `write` wrote.

    Args:
        file: open for reading.
        name: of the texts, as `write` had it.

    Returns:
        The texts.

    Raises:
        ValueError: it is damaged.
    """
    offset, whole = file[f"{name}_offset"][:], file[name][:].tobytes()
    if not are_offsets(offset, len(offset) - 1, len(whole)):
        raise ValueError(f"its texts {name!r} are damaged")
    return [whole[a:b].decode() for a, b in pairwise(offset.tolist())]
