"""Rows of a dataset by what their tokens are, as a table, with labels, and their means.

Each function takes the dataset first; all are members of `Activations` too.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from theloom.dataset.companions import one_each
from theloom.errors import ConfigError, printable
from theloom.rows import expression
from theloom.rows.document import Document
from theloom.rows.roles import ROLES

if TYPE_CHECKING:
    import pandas as pd

    from theloom.dataset.reader import ActivationsReader

_Reader = TypeVar("_Reader", bound="ActivationsReader")

_OWN = ("document", "token", "position", "input_id")
_OF_TOKENS = ("special", "role", "message", "char_start", "char_end", "generated")
_BYTES_AT_ONCE = 1 << 24  # of rows in memory


class RowTable(Mapping[str, np.ndarray]):
    """What the rows of a dataset are: a column by its name, with an entry for each row.

    `document` (as `acts.document` takes it), `token` (its number in the document), `position` (in
    the window), `input_id`; `special`, `role`, `message`, `char_start`, `char_end` and
    `generated` where the file has them; then the columns of the corpus. A column is read when it
    is asked for.
    """

    def __init__(self, acts: "ActivationsReader") -> None:
        self._acts = acts
        own = [*_OWN, *(name for name in _OF_TOKENS if acts.tokens_of(name) is not None)]
        # a column of the corpus whose name is taken gets a prefix
        self._of_corpus = {f"corpus.{n}" if n in own else n: n for n in acts.columns}
        self.columns = [*own, *self._of_corpus]

    def __getitem__(self, name: str) -> np.ndarray:
        acts = self._acts
        if name not in self.columns:
            raise ConfigError(
                f"no column {printable(str(name))!r} in {acts.path}; it has "
                f"{', '.join(map(printable, self.columns))} (corpus.columns adds others)"
            )
        if name in self._of_corpus:
            return acts.columns[self._of_corpus[name]].array()[self._document]
        if name == "document":
            return self._document
        if name == "token":
            return self._token - acts.document_tokens[self._document]
        if name == "position":
            return acts.position.numpy(...)
        if name == "input_id":
            return acts.input_ids.numpy(...)  # of codes (rows, codebooks)
        table = acts.token_table(name)
        assert table is not None
        found = table.numpy(...)
        if name == "role":
            return np.array(ROLES)[found]
        return found.astype(bool) if name in ("special", "generated") else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __repr__(self) -> str:
        return f"<table of {len(self._acts):,} rows: {', '.join(map(printable, self.columns))}>"

    def to_dataframe(self) -> "pd.DataFrame":
        """Read the table into pandas.

        Returns:
            A `pandas.DataFrame` with a line for each row, indexed by its number.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("tables need pandas; pip install 'theloom[notebook]'") from None
        columns = {name: self[name] for name in self.columns}
        columns["input_id"] = one_each(columns["input_id"])
        return pandas.DataFrame(columns).rename_axis("row")

    @property
    def _token(self) -> np.ndarray:
        tokens = self._acts.row_tokens
        return np.arange(len(self._acts)) if tokens is None else tokens

    @property
    def _document(self) -> np.ndarray:
        return np.searchsorted(self._acts.document_tokens, self._token, "right") - 1


def select(acts: _Reader, text: str) -> _Reader:
    """The rows of the tokens that an expression keeps, as `rows.keep` has it.

    Args:
        acts: the dataset.
        text: the expression.

    Returns:
        The same dataset, of which these rows alone are seen; hidden states are read when they are
        indexed.

    Raises:
        ConfigError: the expression does not parse, or needs what the file does not have; or its
            rows are pooled.
    """
    parsed = expression.parse(text, "select")
    if acts.pooled:
        raise ConfigError(
            f"select({text!r}): a row of {acts.path} is pooled over tokens "
            f"(rows.pool={acts.pool}), and no token's own; take rows by number: acts[hook][rows]"
        )
    masks = [parsed.mask(document) for document in _documents(acts)]
    kept = np.concatenate(masks or [np.zeros(0, bool)])
    tokens = acts.row_tokens
    return acts.taking((kept if tokens is None else kept[tokens]).nonzero()[0])


def _documents(acts: "ActivationsReader") -> Iterator[Document]:
    """What a file knows of its documents, whose texts it does not have."""
    tables = {n: t.numpy(...) for n in _OF_TOKENS if (t := acts.tokens_of(n)) is not None}
    columns = {name: column.tolist() for name, column in acts.columns.items()}
    offset = acts.document_tokens.tolist()
    for number, first in enumerate(offset[:-1]):
        part = slice(first, offset[number + 1])
        known: dict[str, Any] = {name: table[part] for name, table in tables.items()}
        known["columns"] = {name: values[number] for name, values in columns.items()}
        yield Document(acts.document_id_of(number), part.stop - first, **known)


def xy(
    acts: "ActivationsReader", hook: str, label: str, missing: str = "error"
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a hook point and a label of each, as scikit-learn takes them.

    Args:
        acts: the dataset.
        hook: the hook point.
        label: a column of `acts.rows`, such as one of `corpus.columns`.
        missing: `drop` leaves out rows whose document has no value; `error`: there may be none.

    Returns:
        (rows, elements) float32, and (rows,).

    Raises:
        HookError: the dataset has no such hook point.
        ConfigError: it has no such column, or a row has no value.
    """
    labels, there = _labels(acts, label, missing)
    x = np.asarray(acts[hook] if there is None else acts[hook][there], "f4")
    return x.reshape(len(x), -1), labels


def _labels(
    acts: "ActivationsReader", label: str, missing: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels, and where some are missing the rows that have one."""
    if missing not in ("error", "drop"):
        raise ConfigError(f"missing={missing!r}: give 'error' or 'drop'")
    labels = RowTable(acts)[label]
    none = np.ma.getmaskarray(labels).copy()
    if labels.dtype.kind == "f":
        none |= np.isnan(np.ma.getdata(labels))
    labels = np.ma.getdata(labels)
    if not none.any():
        return labels, None
    if missing == "error":
        raise ConfigError(
            f"{label}: {int(none.sum()):,} of {len(none):,} rows have no value; give each document "
            "one, or leave them out: missing='drop'"
        )
    return labels[~none], (~none).nonzero()[0]


def mean(
    acts: "ActivationsReader", hook: str, by: str | None = None, missing: str = "error"
) -> Any:
    """The mean row of a hook point, or of each label: for a difference of means.

    Args:
        acts: the dataset.
        hook: the hook point.
        by: a column of `acts.rows`; None: of all rows.
        missing: as of `xy`.

    Returns:
        A float32 array of a row's shape; with `by` a dict of them by label. Sums are in FP64.

    Raises:
        HookError: the dataset has no such hook point.
        ConfigError: there are no rows, or as of `xy`.

    Examples:
        >>> from theloom.dataset.activations import open_activations
        >>> acts = open_activations("results/tiny/activations.h5")
        >>> means = acts.mean("blocks.1.hook_resid_post", by="document")
        >>> sorted(means), (means[1] - means[0]).shape
        ([0, 1], (32,))
    """
    rows = acts[hook]
    if not len(rows):
        raise ConfigError("mean: no rows are selected")
    there: np.ndarray | None = None
    values, group = np.zeros(1), np.zeros(len(rows), np.intp)
    if by is not None:
        labels, there = _labels(acts, by, missing)
        values, group = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(values), *rows.shape[1:]))
    step = max(1, _BYTES_AT_ONCE * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(group), step):
        part = slice(start, start + step)
        block = rows[part if there is None else there[part]].double().numpy()
        order = np.argsort(group[part], kind="stable")
        there_now, starts = np.unique(group[part][order], return_index=True)
        sums[there_now] += np.add.reduceat(block[order], starts, axis=0)
    counts = np.bincount(group, minlength=len(values)).reshape(-1, *(1 for _ in rows.shape[1:]))
    means = (sums / counts).astype("f4")
    return means[0] if by is None else dict(zip(values.tolist(), means, strict=True))


def scale(acts: "ActivationsReader", hook: str, by: str) -> float:
    """The factor that a trainer of sparse autoencoders multiplies rows with, exact over all rows.

    The file has it in its statistics. Selected rows are read for it, all of them once.

    Args:
        acts: the dataset.
        hook: the hook point.
        by: `saelens`: rows get a mean norm of sqrt(width); `dictionary_learning`: a mean squared
            norm of 1.

    Returns:
        The factor.

    Raises:
        HookError: the dataset has no such hook point.
        ConfigError: there is no such way; or rows are zero, or not all finite.

    Examples:
        >>> from theloom.dataset.activations import open_activations
        >>> acts = open_activations("results/tiny/activations.h5")
        >>> rows = acts["blocks.1.hook_resid_post"][:].float()
        >>> scaled = acts.scale("blocks.1.hook_resid_post", "saelens") * rows
        >>> round(float(scaled.norm(dim=1).mean()), 3), round(32**0.5, 3)
        (5.657, 5.657)
    """
    width = acts[hook].shape[1:]
    if by not in ("saelens", "dictionary_learning"):
        raise ConfigError(f"scale by {by!r}: give 'saelens' or 'dictionary_learning'")
    norm, squared, nonfinite = _norms(acts, hook)
    if nonfinite:
        raise ConfigError(f"{hook}: {nonfinite:,} values are not finite; there is no scale")
    size = norm / float(np.prod(width)) ** 0.5 if by == "saelens" else squared**0.5
    if not size > 0:
        raise ConfigError(f"{hook}: its rows are zero; there is no scale")
    return 1 / size


def _norms(acts: "ActivationsReader", hook: str) -> tuple[float, float, int]:
    """The mean norm of the rows, their mean squared norm, and how many values are not finite."""
    if not acts.selected:
        found = acts.statistics[hook]
        return found.norm, float((found.variance + found.mean**2).sum()), found.nonfinite
    rows, nonfinite, norm, squared = acts[hook], 0, 0.0, 0.0
    step = max(1, _BYTES_AT_ONCE * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), step):
        block = rows[start : start + step].double().flatten(1)
        nonfinite += int((~block.isfinite()).sum())
        squares = block.square().sum(dim=1)
        norm += float(squares.sqrt().sum())
        squared += float(squares.sum())
    count = max(1, len(rows))
    return norm / count, squared / count, nonfinite
