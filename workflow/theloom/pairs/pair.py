"""Two models over the same tokens: `theloom.open_pair("a/activations.h5", "b/activations.h5")`.

For crosscoders and model diffing: a base model and its fine-tune, adapters, or checkpoints of one
training run. Any number of files goes. Row r of all of them is the same token, which is proved when
they are opened.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from theloom.dataset.activations import Activations, open_activations
from theloom.dataset.batches import BatchIterator, RowBatches
from theloom.dataset.reader import TABLES
from theloom.errors import ConfigError, HookError
from theloom.pairs.same_tokens import check_same_tokens

if TYPE_CHECKING:
    import torch

    from theloom.dataset.rows import HookRows, Index, Rows

Source = str | Path | Activations


def open_pair(
    *files: Source, names: Sequence[str] | None = None, allow: Collection[str] = ()
) -> "Pair":
    """Open the hidden states of several models over the same tokens; `theloom.open_pair` is the
    same.

    Args:
        *files: paths of `activations.h5` or of single shards, or datasets that are open; at least
            two.
        names: of the models; None: the names of the files' folders, or 0, 1, … where these are
            equal.
        allow: as of `theloom.open`.

    Returns:
        The datasets, row by row beside each other.

    Raises:
        StoreError: a file cannot be read, or has rows of other tokens: with the first difference.
        ConfigError: fewer than two files, or names that are not one for each.

    Examples:
        >>> file = "results/tiny/activations.h5"
        >>> pair = open_pair(file, file, names=["base", "tuned"])
        >>> pair["blocks.1.hook_resid_post"][:10].shape
        torch.Size([10, 2, 32])
    """
    if len(files) < 2:
        raise ConfigError(f"open_pair: {len(files)} file; give two or more")
    opened = [f if isinstance(f, Activations) else open_activations(f, allow) for f in files]
    if names is None:
        names = [acts.path.resolve().parent.name for acts in opened]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
    if len(names) != len(opened) or len(set(names)) < len(names):
        raise ConfigError(
            f"open_pair: names {', '.join(map(repr, names))} for {len(opened)} files; give each "
            "a name of its own"
        )
    for other in opened[1:]:
        check_same_tokens(opened[0], other)
    return Pair(dict(zip(names, opened, strict=True)))


class Pair:
    """Datasets whose row r is the same token: `pair[hook][rows]` is a tensor (rows, models, …).

    `models`: the datasets by name; `names`: of the models; `hooks`: the hook points that all of
    them have; `len`: rows. Tokens, documents and labels are those of any of them, such as
    `pair.first`.

    Args:
        models: datasets of the same tokens, by name.
    """

    def __init__(self, models: Mapping[str, Activations]) -> None:
        self.models = dict(models)

    @property
    def names(self) -> list[str]:
        """Names of the models, in the order of the axis `models`."""
        return list(self.models)

    @property
    def first(self) -> Activations:
        """The first dataset."""
        return next(iter(self.models.values()))

    @property
    def hooks(self) -> list[str]:
        """The hook points that all models have, in the order of the first one."""
        return [h for h in self.first.hooks if all(h in acts for acts in self.models.values())]

    def __len__(self) -> int:
        return len(self.first)

    def __repr__(self) -> str:
        return (
            f"<{len(self):,} rows of {len(self.models)} models: {', '.join(self.names)}; "
            f"{len(self.hooks)} common hook points>"
        )

    def __getitem__(self, hook: str) -> "PairRows":
        return PairRows(hook, [acts[hook] for acts in self.models.values()])

    def select(self, expression: str) -> Self:
        """The rows that an expression keeps, of every model: as `Activations.select`.

        Args:
            expression: of what tokens are, in the words of `rows.keep`; columns are the first
                dataset's.

        Returns:
            The same pair, of which these rows alone are seen.

        Raises:
            ConfigError: the expression does not parse, or needs what the file does not have.
        """
        first = self.first.select(expression)
        chosen, seen = first.rows_of("row").numpy(...), copy.copy(self)
        before = self.first.rows_of("row").numpy(...)
        places = np.searchsorted(before, chosen)
        seen.models = {name: acts.taking(places) for name, acts in self.models.items()}
        return seen

    def batches(
        self,
        hooks: "str | Sequence[str] | Mapping[str, str]",
        batch_size: int,
        *,
        epochs: int | None = 1,
        dtype: str | None = None,
        device: "torch.device | str | None" = None,
        scale: float | None = None,
        **others: Any,
    ) -> BatchIterator:
        """All rows in batches, the same rows of every model. `dataset`: the same for a DataLoader.

        Args:
            hooks: a hook point: batches are tensors (batch_size, models, …); several: dicts of
                them by hook point; by name of the model a hook point: dicts of tensors
                (batch_size, …) by name, for models of other widths. `input_ids`, `document`,
                `position` and `row` are accepted too.
            batch_size: rows of a batch.
            epochs: passes over the rows, each in another order; None: without end.
            dtype: of hook points, `fp32`, `fp16` or `bf16`; None: as stored.
            device: of the batches; None: the CPU.
            scale: a factor for hook points, the same for all models; rows are FP32 then.
            **others: as of `Activations.batches`: `shuffle`, `seed`, `drop_last`, ….

        Returns:
            An iterator of the batches.

        Raises:
            HookError: a model has no such hook point, or its rows have another shape or dtype than
                the first model's, so that they do not fit in one tensor.
            ValueError: a size is less than 1.

        Examples:
            >>> file = "results/tiny/activations.h5"
            >>> pair = open_pair(file, file)
            >>> hook = "blocks.1.hook_resid_post"
            >>> [rows.shape[:2] for rows in pair.batches(hook, 145, shuffle=True)]
            [torch.Size([145, 2]), torch.Size([145, 2])]
            >>> by_name = next(pair.batches({"0": hook, "1": hook}, 64))
            >>> by_name["1"].shape
            torch.Size([64, 32])
        """
        rows = self.dataset(hooks, batch_size, **others)
        return BatchIterator(rows, epochs=epochs, dtype=dtype, device=device, scale=scale)

    def dataset(
        self, hooks: "str | Sequence[str] | Mapping[str, str]", batch_size: int, **others: Any
    ) -> RowBatches:
        """The batches as an IterableDataset, for DataLoader(pair.dataset(…), batch_size=None). It
        raises the same errors as `batches`.

        Args:
            hooks: as of `batches`.
            batch_size: rows of a batch.
            **others: the other arguments of `batches`.

        Returns:
            The dataset.
        """
        if not isinstance(hooks, Mapping):
            return RowBatches(_Columns(self, None), hooks, batch_size, **others)
        return RowBatches(_Columns(self, hooks), list(hooks), batch_size, **others)


class PairRows:
    """The rows of one hook point of several models, stacked: (rows, models, …).

    Args:
        hook: the hook point, for messages.
        rows: of each model.

    Raises:
        HookError: rows of the models have other shapes or dtypes.
    """

    def __init__(self, hook: str, rows: "Sequence[HookRows]") -> None:
        self._rows = list(rows)
        for other in self._rows:
            if (other.shape[1:], other.dtype) != (rows[0].shape[1:], rows[0].dtype):
                raise HookError(
                    f"{hook}: rows of shape {rows[0].shape[1:]} in {rows[0].dtype} and of shape "
                    f"{other.shape[1:]} in {other.dtype} do not fit in one tensor; take them by "
                    "name: pair.batches({name: hook, ...}, ...) or pair.models[name][hook]"
                )
        self.shape = (len(rows[0]), len(rows), *rows[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: "Index") -> "torch.Tensor":
        return self.tensor(self.numpy(index))

    @property
    def dtype(self) -> "torch.dtype":
        """The stored one."""
        return self._rows[0].dtype

    @property
    def stored(self) -> np.dtype:
        """The type of `numpy`: of the stored bits."""
        return self._rows[0].stored

    def numpy(self, index: "Index") -> np.ndarray:
        """Rows as an array of the stored bits.

        Args:
            index: as of `Rows.numpy`: a number gives (models, …), everything else (rows, models,
                …).

        Returns:
            A copy.

        Raises:
            IndexError: a row is beyond the dataset, or a mask has another length.
        """
        axis = 0 if isinstance(index, int | np.integer) else 1
        return np.stack([rows.numpy(index) for rows in self._rows], axis)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill an array with consecutive rows.

        Args:
            out: (rows, models, …) of `stored`.
            start: the first row.
        """
        for number, rows in enumerate(self._rows):
            out[:, number] = rows.numpy(slice(start, start + len(out)))

    def tensor(self, bits: np.ndarray) -> "torch.Tensor":
        """A tensor in the stored dtype over the memory of an array of bits.

        Args:
            bits: what a read returned: integers of the width of an element.

        Returns:
            A tensor of the same shape; nothing is copied.
        """
        return self._rows[0].tensor(bits)


class _Columns:
    """What batches read of a pair: by hook point stacked, or by name of a model its own."""

    def __init__(self, pair: Pair, by_name: Mapping[str, str] | None) -> None:
        self._pair, self._by_name = pair, by_name

    def __len__(self) -> int:
        return len(self._pair)

    def rows_of(self, name: str) -> "Rows | PairRows":
        if self._by_name is None:
            alone = name in TABLES or name == "row"
            return self._pair.first.rows_of(name) if alone else self._pair[name]
        if name not in self._pair.models:
            if name in TABLES or name == "row":
                return self._pair.first.rows_of(name)
            raise HookError(f"no model {name!r} in the pair; it has {', '.join(self._pair.names)}")
        return self._pair.models[name].rows_of(self._by_name[name])
