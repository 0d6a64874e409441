"""TheLoom: hidden states of transformer models, extracted within the memory you have.

`theloom.open("results/<run>/activations.h5")` reads the result of a run.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theloom.dataset.activations import Activations

__version__ = "0.1.0"
__all__ = ["open"]


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
