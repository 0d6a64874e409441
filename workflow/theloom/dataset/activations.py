"""Reading a run's hidden states: `theloom.open("results/<run>/activations.h5")`.

Rows are mapped from the files where they lie, and come as torch tensors in their stored dtype.
Before anything is read, every file that the dataset refers to is checked, since HDF5 reads a
missing one as NaN.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.dataset.reader import ActivationsReader
from theloom.errors import ConfigError
from theloom.store import file_format

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pandas as pd
    import torch
    import xarray as xr

    from theloom.dataset.batches import BatchIterator, RowBatches
    from theloom.dataset.conversions import Cache
    from theloom.dataset.selecting import RowTable


def open_activations(path: str | Path, allow: Collection[str] = ()) -> "Activations":
    """Open `activations.h5` or a single shard; `theloom.open` is the same.

    Args:
        path: the file, or the URL of a pushed one.
        allow: names of files outside of its own folder that it may refer to, as it spells them.

    Returns:
        The dataset. Rows are read when they are indexed.

    Raises:
        StoreError: a file is missing, cut short, damaged or of another run, or outside of the
            folder and not allowed.

    Examples:
        >>> acts = open_activations("results/tiny/activations.h5")
        >>> acts.hooks
        ['blocks.1.hook_resid_post']
        >>> acts["blocks.1.hook_resid_post"][100:200].shape
        torch.Size([100, 32])
    """
    try:
        return Activations(path, allow)
    except file_format.DAMAGE as error:
        raise file_format.damaged_error(path, error) from None


class Activations(ActivationsReader):
    """The hidden states of a run, and the forms that other libraries take them in.

    `acts[hook][rows]` gives a tensor; row r of every hook point, and of the token tables, is the
    same token. `hooks`: names of the hook points; `dtype`: the stored one; `len`: rows;
    `attributes`: where the rows come from.

    Examples:
        >>> acts = open_activations("results/tiny/activations.h5")
        >>> len(acts), acts.dtype
        (290, torch.bfloat16)
        >>> document = acts.document(1)
        >>> document["blocks.1.hook_resid_post"].shape == (len(document), 32)
        True
    """

    def __repr__(self) -> str:
        from theloom.dataset import conversions

        return conversions.describe(self)

    def _repr_html_(self) -> str:
        from theloom.dataset import conversions

        return conversions.describe_html(self)

    @property
    def rows(self) -> "RowTable":
        """A table of what each row is: `selecting.RowTable`.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> acts.rows["document"][258:262].tolist()
            [0, 0, 1, 1]
        """
        from theloom.dataset.selecting import RowTable

        return RowTable(self)

    def select(self, expression: str) -> "Activations":
        """The rows that an expression keeps, lazily: `selecting.select`.

        Args:
            expression: as `rows.keep` has it, such as `last | first`.

        Returns:
            The same dataset, of which these rows alone are seen; hidden states are read when they
            are indexed.

        Raises:
            ConfigError: the expression does not parse, or needs what the file does not have; or its
                rows are pooled.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> last = acts.select("last | first")
            >>> last["blocks.1.hook_resid_post"].shape
            (4, 32)
        """
        from theloom.dataset import selecting

        return selecting.select(self, expression)

    def xy(self, hook: str, label: str, missing: str = "error") -> "tuple[np.ndarray, np.ndarray]":
        """The rows of a hook point and a label of each, for scikit-learn: `selecting.xy`.

        Args:
            hook: the hook point.
            label: a column of `rows`, such as one of `corpus.columns`.
            missing: `drop` leaves out rows whose document has no value; `error`: there may be none.

        Returns:
            (rows, elements) float32, and (rows,).

        Raises:
            HookError: the dataset has no such hook point.
            ConfigError: it has no such column, or a row has no value.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> x, y = acts.xy("blocks.1.hook_resid_post", "document")
            >>> x.shape, y.shape
            ((290, 32), (290,))
        """
        from theloom.dataset import selecting

        return selecting.xy(self, hook, label, missing)

    def mean(self, hook: str, by: str | None = None, missing: str = "error") -> Any:
        """The mean row of a hook point, or of each label: `selecting.mean`.

        Args:
            hook: the hook point.
            by: a column of `rows`; None: of all rows.
            missing: as of `xy`.

        Returns:
            A float32 array of a row's shape; with `by` a dict of them by label.

        Raises:
            HookError: the dataset has no such hook point.
            ConfigError: there are no rows, or as of `xy`.
        """
        from theloom.dataset import selecting

        return selecting.mean(self, hook, by, missing)

    def scale(self, hook: str, by: str) -> float:
        """The factor that SAELens or dictionary_learning scales rows with: `selecting.scale`.

        Args:
            hook: the hook point.
            by: `saelens`: rows get a mean norm of sqrt(width); `dictionary_learning`: a mean
                squared norm of 1.

        Returns:
            The factor.

        Raises:
            HookError: the dataset has no such hook point.
            ConfigError: there is no such way; or rows are zero, or not all finite.
        """
        from theloom.dataset import selecting

        return selecting.scale(self, hook, by)

    def to_dataframe(
        self,
        of: str = "documents",
        rows: slice | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
    ) -> "pd.DataFrame":
        """A table as pandas has it: `conversions.documents_frame` or `conversions.tokens_frame`.

        Args:
            of: `documents` (a row for each document) or `tokens` (a row for each token).
            rows: which tokens; all of them by default.
            tokenizer: folder, or name on the hub, of a tokenizer that gives the texts of tokens;
                None: the file has them itself.
            trust_remote_code: run Python code that comes with that tokenizer.

        Returns:
            A table with a row for each document or token.

        Raises:
            ConfigError: `of` is another word, pandas is not installed, or more than ten million
                tokens are requested.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> acts.to_dataframe()["tokens"].tolist()
            [260, 30]
        """
        from theloom.dataset import conversions

        if of not in ("documents", "tokens"):
            raise ConfigError(
                f"to_dataframe({of!r}): give 'documents' or 'tokens'; "
                "hidden states: acts.to_xarray()"
            )
        return (
            conversions.documents_frame(self)
            if of == "documents"
            else conversions.tokens_frame(self, rows, tokenizer, trust_remote_code)
        )

    def to_xarray(
        self, hooks: Sequence[str] | None = None, rows: slice | None = None
    ) -> "xr.Dataset":
        """Hidden states with tokens as coordinates, read into memory: `conversions.to_xarray`.

        Args:
            hooks: hook points; None: all of them.
            rows: which rows; None: all of them.

        Returns:
            A variable for each hook point, along `row`; BF16 becomes float32.

        Raises:
            ConfigError: xarray is not installed.
            HookError: the dataset has no such hook point.
        """
        from theloom.dataset import conversions

        return conversions.to_xarray(self, hooks, rows)

    def to_datasets(self, hooks: Sequence[str] | None = None) -> "datasets.Dataset":
        """A `datasets.Dataset`, a row for each stored row: `conversions.to_datasets`.

        Args:
            hooks: hook points; None: all of them.

        Returns:
            Columns for the token tables and those of the corpus, and a list of float32 for each
            hook point.

        Raises:
            ConfigError: datasets is not installed.
            HookError: the dataset has no such hook point.
        """
        from theloom.dataset import conversions

        return conversions.to_datasets(self, hooks)

    def cache(self, document: int | str) -> "Cache":
        """One document's hidden states as TransformerLens shapes them: `conversions.Cache`.

        Args:
            document: its number or id.

        Returns:
            A mapping from hook points to tensors (1, position, …), read when they are indexed.

        Raises:
            ConfigError: the document was split into several windows, or its rows are of some
                tokens.
            KeyError: no document has this id.
            IndexError: no document has this number.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> acts.cache(1)["blocks.1.hook_resid_post"].shape
            torch.Size([1, 30, 32])
        """
        from theloom.dataset import conversions

        return conversions.Cache(self, document)

    def batches(
        self,
        hooks: str | Sequence[str],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        epochs: int | None = 1,
        dtype: str | None = None,
        device: "torch.device | str | None" = None,
        scale: float | None = None,
        **others: Any,
    ) -> "BatchIterator":
        """All rows in batches, for a training loop. `dataset` is the same for a DataLoader.

        Args:
            hooks: a hook point, or several; `input_ids`, `document`, `position` and `row` (the
                number of the row in the dataset) are accepted too.
            batch_size: rows of a batch; the last one may have fewer.
            shuffle: mix the rows through a buffer; the module `theloom.dataset.batches` states how
                well.
            seed: of the order; the same seed gives the same order.
            drop_last: leave out a last batch that has fewer rows.
            epochs: passes over the rows, each in another order; None: without end, as SAELens'
                trainers need it.
            dtype: of hook points, `fp32`, `fp16` or `bf16`; None: as stored.
            device: of the batches; None: the CPU.
            scale: a factor for hook points, as `scale` gives it; rows are FP32 then.
            **others: `block_rows`, `buffer_rows`, `rank` and `world_size` of `RowBatches`.

        Returns:
            An iterator of tensors (batch_size, …) if `hooks` is a string, else of dicts of them by
            name. It is a data provider of SAELens, and a buffer of dictionary_learning, for which
            it has a `config`.

        Raises:
            HookError: the dataset has no such hook point.
            ValueError: a size is less than 1, or there is no such dtype.

        Examples:
            >>> acts = open_activations("results/tiny/activations.h5")
            >>> hook = "blocks.1.hook_resid_post"
            >>> [len(rows) for rows in acts.batches(hook, batch_size=128, shuffle=True)]
            [128, 128, 34]
        """
        from theloom.dataset.batches import BatchIterator, trainer_config

        rows = self.dataset(
            hooks, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, **others
        )
        config = {}
        if isinstance(hooks, str) and hooks in self:
            config = trainer_config(hooks, self[hooks].shape[1:], batch_size, self.attributes)
        return BatchIterator(
            rows, epochs=epochs, dtype=dtype, device=device, scale=scale, config=config
        )

    def dataset(self, hooks: str | Sequence[str], batch_size: int, **others: Any) -> "RowBatches":
        """The batches as an IterableDataset, for DataLoader(acts.dataset(…), batch_size=None).

        Args:
            hooks: a hook point, or several, as of `batches`.
            batch_size: rows of a batch.
            **others: the other arguments of `RowBatches`, such as `shuffle` and `seed`.

        Returns:
            The dataset, which gives the tensors of `batches`.

        Raises:
            HookError: the dataset has no such hook point.
            ValueError: a size is less than 1, or there is no such dtype.
        """
        from theloom.dataset.batches import RowBatches

        return RowBatches(self, hooks, batch_size, **others)
