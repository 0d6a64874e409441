"""TheLoom: hidden states of transformer models, extracted within the memory you have.

`theloom.open("results/<run>/activations.h5")` reads the result of a run.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theloom.dataset.activations import Activations
    from theloom.pairs.pair import Pair

__version__ = "0.1.0"
__all__ = ["open", "open_pair"]


def open(path: str | Path, allow: Collection[str] = ()) -> "Activations":
    """Open `activations.h5`, or a single shard.

    Args:
        path: The file.
        allow: Names of files outside the dataset's own folder that it may refer to.

    Returns:
        The dataset: rows by hook point, documents, batches, exports.

    Raises:
        StoreError: The file, or one that it refers to, is missing, damaged or of another format.

    Examples:
        >>> import theloom
        >>> acts = theloom.open("results/tiny/activations.h5")
        >>> acts[acts.hooks[0]][:2].dtype
        torch.bfloat16
    """
    from theloom.dataset.activations import open_activations

    return open_activations(path, allow)


def open_pair(
    *files: "str | Path | Activations",
    names: Sequence[str] | None = None,
    allow: Collection[str] = (),
) -> "Pair":
    """Open the hidden states of several models over the same tokens.

    Args:
        *files: Paths of `activations.h5`, or datasets that are open; at least two.
        names: Of the models; None: the names of the files' folders.
        allow: As of `open`.

    Returns:
        The datasets, row by row beside each other: `pair[hook][rows]` is (rows, models, width).

    Raises:
        StoreError: A file cannot be read, or has rows of other tokens: with the first difference.
        ConfigError: Fewer than two files, or names that are not one for each.

    Examples:
        >>> import theloom
        >>> file = "results/tiny/activations.h5"
        >>> pair = theloom.open_pair(file, file, names=["base", "tuned"])
        >>> len(pair), pair.names
        (290, ['base', 'tuned'])
    """
    from theloom.pairs import pair

    return pair.open_pair(*files, names=names, allow=allow)
