"""TheLoom: hidden states of transformer models, extracted within the memory you have.

`theloom.open("results/<run>/activations.h5")` reads the result of a run.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theloom.config.compose import Run
    from theloom.dataset.activations import Activations
    from theloom.pairs.pair import Pair
    from theloom.pipeline.stream import RowStream

__version__ = "0.1.0"
__all__ = ["open", "open_pair", "stream"]


def open(path: str | Path, allow: Collection[str] = ()) -> "Activations":
    """Open `activations.h5`, or a single shard, also of a remote store.

    Args:
        path: The file; or the URL of what `theloom push` uploaded, such as `s3://bucket/run`, of
            which rows are read by ranges.
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


def stream(
    profile: "str | Run | None" = None,
    hooks: str | Sequence[str] | None = None,
    batch_size: int = 4096,
    *,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    **others: Any,
) -> "RowStream":
    """The rows of a run in memory, as they are computed: no file of hidden states is written.

    Rows are those that `theloom run` would write with the same words, bit for bit with as many
    threads. Tokens and the record of the model are in a temporary folder, which is removed at the
    end.

    Args:
        profile: A profile of the configuration, or a run that `theloom.config.compose.runs` gave;
            None: the default profile.
        hooks: A hook point (then batches are tensors) or several (then dicts by name), by name or
            pattern; also `input_ids`, `document`, `position` and `row`, the number of the row in
            the `activations.h5` of the same run. None: all hook points of the profile.
        batch_size: Rows of a batch; the last one of an epoch may have fewer.
        overrides: Words as of `theloom run`: `key=value`, or `overrides=FILE`.
        config_dir: The folder with `default.yaml` and the profiles; None: that of the project in
            the current folder, else of the installation.
        **others: `shuffle_buffer` (rows that are mixed, by default 32,768; 0: rows stay in the
            order in which they are computed), `seed` of the order, `epochs` (default 1; None: no
            end), `rank` and `world_size` (default: of torch.distributed), which share the shards.

    Returns:
        An IterableDataset, also for `DataLoader(…, batch_size=None)`: batches (batch_size, …) on
        the CPU, in the precision of the store.

    Raises:
        TheLoomError: As of `theloom run`; what cannot be streamed: layer by layer, answers.

    Examples:
        >>> import theloom
        >>> words = ["corpus.max_tokens=300", "extraction.device=cpu"]
        >>> hook = "blocks.0.hook_resid_post"
        >>> rows = theloom.stream("smollm2-135m", hook, 200, overrides=words)  # doctest: +SKIP
        >>> for batch in rows:  # doctest: +SKIP
        ...     print(batch.shape)
        torch.Size([200, 576])
        torch.Size([100, 576])
    """
    from theloom.pipeline.stream import open_stream

    return open_stream(profile, hooks, batch_size, overrides, config_dir, **others)
