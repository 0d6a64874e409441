"""A dataset in memory in the forms of other libraries: pandas, xarray, datasets. Files are written
by `theloom.exports`.

Each function takes the dataset first; the most used ones are methods of `Activations` too. pandas,
xarray and datasets are optional: `pip install 'theloom[notebook,hub]'`.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.auto import SIDES
from theloom.dataset import token_text
from theloom.dataset.companions import (
    columns_of,
    feature,
    one_each,
    pandas_module,
    plain,
    series,
    token_tables_of,
)
from theloom.errors import ConfigError, HookError, printable
from theloom.rows.roles import ROLES
from theloom.store import file_format
from theloom.store.tables import tokens as token_tables

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    import torch
    import xarray as xr

    from theloom.dataset.reader import ActivationsReader


_ROWS_AT_ONCE = 1 << 14
_LARGEST_FRAME = 10_000_000  # rows: more tokens than a notebook's table can hold


def documents_frame(acts: "ActivationsReader") -> "pd.DataFrame":
    """A table with a row for each document.

    Args:
        acts: the dataset.

    Returns:
        Columns `id`, `first_row`, `tokens` and `windows` (into how many it was split), `rows` where
        not every token has one, then those of the corpus.

    Raises:
        ConfigError: pandas is not installed.
    """
    offsets = acts.document_offset
    windows = np.bincount(acts.window_document, minlength=len(offsets) - 1)
    own = {
        "id": acts.documents,
        "first_row": offsets[:-1],
        "tokens": np.diff(acts.document_tokens),
        "windows": windows,
    }
    if acts.row_tokens is not None:
        own["rows"] = np.diff(offsets)
    more = {name: series(column) for name, column in columns_of(acts, own).items()}
    return pandas_module().DataFrame(own | more).rename_axis("document")


def tokens_frame(
    acts: "ActivationsReader",
    rows: slice | Sequence[int] | np.ndarray | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> "pd.DataFrame":
    """A table with a row for each token.

    Args:
        acts: the dataset.
        rows: which tokens; all of them by default.
        tokenizer: folder, or name on the hub, of a tokenizer that gives the texts; None: the file
            has them itself.
        trust_remote_code: run Python code that comes with that tokenizer.

    Returns:
        Columns `document` (as `acts.document` takes it), `position` (in the window), `input_id` and
        `token` (its text); then what the file has of `special`, `role`, `message`, `char_start` and
        `char_end`; then the columns of the corpus.

    Raises:
        ConfigError: more than ten million rows are requested, or pandas is not installed.
        ModelError: the tokenizer is unavailable.
    """
    rows = slice(None) if rows is None else rows
    numbers: Any
    if isinstance(rows, slice):
        part = range(len(acts))[rows]
        numbers = (
            np.arange(part.start, part.stop, part.step) if len(part) <= _LARGEST_FRAME else part
        )
    else:
        numbers = np.arange(len(acts))[rows]
    if len(numbers) > _LARGEST_FRAME:
        raise ConfigError(
            f"{len(numbers):,} tokens are more than a table should hold; "
            "give rows=slice(0, 100_000)"
        )
    ids = acts.input_ids.numpy(numbers)
    document = np.searchsorted(acts.document_offset, numbers, "right") - 1
    own: dict[str, Any] = {
        "document": document,
        "position": acts.position.numpy(numbers),
        "input_id": one_each(ids),
        "token": token_text.texts(acts, ids, tokenizer, trust_remote_code),
        **token_tables_of(acts, numbers),
    }
    if "special" in own:
        own["special"] = own["special"].astype(bool)
    if "role" in own:
        if (own["role"] >= len(ROLES)).any():
            raise file_format.damaged_error(
                acts.path, ValueError("it has roles that there are not")
            )
        own["role"] = pandas_module().Categorical.from_codes(own["role"], list(ROLES))
    more = {name: series(c, document).array for name, c in columns_of(acts, own).items()}
    return pandas_module().DataFrame(own | more, index=pandas_module().Index(numbers, name="row"))


class Cache(Mapping[str, "torch.Tensor"]):
    """One document's hidden states by hook point, shaped as in TransformerLens' ActivationCache.

    Values are (1, position, …), attention patterns and scores (1, head, query, key), in the stored
    dtype; they are read when they are indexed. Keys may be ("resid_post", 5) too.

    Args:
        acts: the dataset.
        document: its number or id.

    Raises:
        ConfigError: the document was split into several windows.
        KeyError: no document has this id.
        IndexError: no document has this number.
    """

    def __init__(self, acts: "ActivationsReader", document: int | str) -> None:
        self._document = acts.document(document)
        if acts.row_tokens is not None:
            raise ConfigError(
                f"{acts.path} has rows of some tokens, or pooled ones, and a cache holds all of a "
                "document; take acts.document(n)[hook]"
            )
        windows = np.searchsorted(
            acts.window_offset, [self._document.rows.start, self._document.rows.stop]
        )
        if windows[1] - windows[0] > 1:
            raise ConfigError(
                f"document {self._document.id!r} was cut into {windows[1] - windows[0]} windows, "
                "each seen by itself; take the rows of one: "
                "acts[hook][acts.window_offset[w]:acts.window_offset[w + 1]]"
            )
        self._acts = acts

    def __getitem__(self, hook: str | tuple[str, int]) -> "torch.Tensor":
        name = self._name(hook) if isinstance(hook, tuple) else hook
        try:
            rows = self._document[name]
        except HookError as error:
            raise KeyError(str(error)) from None
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            # (query, head, key of the longest window)
            rows = rows[..., : len(rows)].transpose(0, 1)
        return rows.unsqueeze(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._acts.hooks)

    def __len__(self) -> int:
        return len(self._acts.hooks)

    def __repr__(self) -> str:
        name, tokens = self._document.id, len(self._document)
        return f"<Cache of {name!r}: {len(self)} hook points, {tokens} tokens>"

    def _name(self, key: tuple[str, int]) -> str:
        value, block = key
        for name in (
            f"{side}blocks.{block}.{prefix}{value}"
            for side in ("", *SIDES)
            for prefix in ("hook_", "attn.hook_", "")
        ):
            if name in self._acts:
                return name
        raise KeyError(f"{key}: no such hook point; there are {', '.join(self._acts.hooks)}")


def to_datasets(
    acts: "ActivationsReader", hooks: Sequence[str] | None = None
) -> "datasets.Dataset":
    """Convert a dataset to a `datasets.Dataset` with a row for each stored row and hidden states as
    float32. It is written to the cache of datasets, piece by piece.

    Args:
        acts: the dataset.
        hooks: hook points; all of them by default.

    Returns:
        Columns document, position, input_id, the other token tables, those of the corpus, and a
        list of float32 for each hook point.

    Raises:
        ConfigError: datasets is not installed.
        HookError: the dataset has no such hook point.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("to_datasets needs datasets; pip install 'theloom[hub]'") from None

    names = _chosen(acts, hooks)
    features: dict[str, Any] = {
        n: datasets.Value("int32") for n in ("document", "position", "input_id")
    }
    if acts.codebooks:
        features["input_id"] = datasets.Sequence(features["input_id"], acts.codebooks)
    tables = [name for name in token_tables.TYPES if acts.token_table(name) is not None]
    features |= {name: datasets.Value("int32") for name in tables}
    columns = columns_of(acts, features)
    features |= {name: feature(datasets, column) for name, column in columns.items()}
    values = {
        name: np.array([*column.array().tolist(), None], object) for name, column in columns.items()
    }
    features |= {name: _feature(datasets, acts[name].shape[1:]) for name in names}

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(acts), _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, len(acts)))
            numbers = np.arange(part.start, part.stop)
            document = np.searchsorted(acts.document_offset, numbers, "right") - 1
            together = {
                "document": acts.document_of.numpy(part),
                "position": acts.position.numpy(part),
                "input_id": acts.input_ids.numpy(part),
                **token_tables_of(acts, numbers),
                **{name: column[document] for name, column in values.items()},
                **{name: acts[name][part].float().numpy() for name in names},
            }
            for n in range(part.stop - part.start):
                yield {name: column[n] for name, column in together.items()}

    return datasets.Dataset.from_generator(
        rows, features=datasets.Features(features), fingerprint=_fingerprint(acts, names)
    )


def to_xarray(
    acts: "ActivationsReader", hooks: Sequence[str] | None = None, rows: slice | None = None
) -> "xr.Dataset":
    """Convert rows to an `xarray.Dataset` along `row`. They are read into memory; BF16 becomes
    float32, since NumPy has no bfloat16.

    Args:
        acts: the dataset.
        hooks: hook points; all of them by default.
        rows: which rows; all of them by default.

    Returns:
        A variable for each hook point; document, position, input_id, the other token tables and the
        columns of the corpus are coordinates. Hook points of the same shape share axes, named such
        as `axis1_576` for 576 elements.

    Raises:
        ConfigError: xarray is not installed.
        HookError: the dataset has no such hook point.
    """
    try:
        import xarray as xr
    except ImportError:
        raise ConfigError("to_xarray needs xarray; pip install 'theloom[notebook]'") from None

    part = slice(*(rows or slice(None)).indices(len(acts)))
    numbers = np.arange(len(acts))[part]
    document = np.searchsorted(acts.document_offset, numbers, "right") - 1
    coordinates: dict[str, Any] = {
        "row": numbers,
        "document": ("row", acts.document_of.numpy(part)),
        "position": ("row", acts.position.numpy(part)),
        "input_id": (("row", "codebook")[: 1 + bool(acts.codebooks)], acts.input_ids.numpy(part)),
    }
    coordinates |= {n: ("row", table) for n, table in token_tables_of(acts, numbers).items()}
    for name, column in columns_of(acts, coordinates).items():
        coordinates[name] = ("row", plain(column)[document])
    values = {}
    for name in _chosen(acts, hooks):
        array = acts[name][part]
        array = array.float() if acts.precision == "bf16" else array
        values[name] = (
            ("row", *(f"axis{axis}_{n}" for axis, n in enumerate(array.shape[1:], 1))),
            array.numpy(),
        )
    return xr.Dataset(
        values, coordinates, attrs={"source": acts.path.name, "precision": acts.stored_as}
    )


def describe(acts: "ActivationsReader") -> str:
    """Summarise a dataset for a terminal.

    Args:
        acts: the dataset.

    Returns:
        A summary in a few lines of text.
    """
    lines = [
        fill(f"  {key:<14}{value}", 80, subsequent_indent=" " * 16) for key, value in _summary(acts)
    ]
    return "\n".join([f"Activations of {acts.path}", *lines])


def describe_html(acts: "ActivationsReader") -> str:
    """Summarise a dataset for a notebook, as `describe` does for a terminal.

    Args:
        acts: the dataset.

    Returns:
        An HTML table.
    """
    left = "style='text-align:left'"
    rows = "".join(
        f"<tr><th {left}>{html.escape(key)}</th><td {left}>{html.escape(value)}</td></tr>"
        for key, value in _summary(acts)
    )
    return f"<table>{rows}</table>"


def _summary(acts: "ActivationsReader") -> list[tuple[str, str]]:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for hook in acts.hooks:
        shapes.setdefault(acts[hook].shape[1:], []).append(hook)
    size = sum(acts[h].nbytes for h in acts.hooks)
    model = acts.attributes.get("model_source", "not recorded")
    tokens = int(acts.document_tokens[-1])
    rows = f"{len(acts):,} tokens of {acts.document_count:,} documents"
    if acts.row_tokens is not None:
        rows = f"{len(acts):,} of {tokens:,} tokens in {acts.document_count:,} documents"
    if acts.pooled:
        by = acts.attributes.get("rows_by", "document")
        rows = f"{len(acts):,}, each the {acts.pool} of a {by}'s tokens, {tokens:,} in all"
    if keep := acts.attributes.get("rows_keep"):
        rows += f"; kept by {keep}"
    return [
        ("rows", rows),
        ("model", f"{model} in {acts.attributes.get('model_precision', 'unknown precision')}"),
        ("stored", f"{acts.stored_as}, {size / 1e9:.3f} GB"),
        *(
            ("hook points", f"{_few(names)}: row of {' × '.join(map(str, shape))}")
            for shape, names in shapes.items()
        ),
        *([("columns", ", ".join(map(printable, acts.columns)))] if acts.columns else []),
        ("next", "acts[hook][rows], acts.document(n), acts.to_dataframe(), acts.cache(n)"),
    ]


def _few(names: list[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= 4
        else f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)} in all)"
    )


def _chosen(acts: "ActivationsReader", hooks: Sequence[str] | None) -> list[str]:
    names = list(acts.hooks if hooks is None else hooks)
    for name in names:
        acts[name]  # raises HookError for one that is missing
    return names


def _feature(datasets: Any, shape: tuple[int, ...]) -> Any:
    feature = datasets.Value("float32")
    for length in reversed(shape):
        feature = datasets.List(feature, length=length)
    return feature


def _fingerprint(acts: "ActivationsReader", names: Sequence[str]) -> str:
    import xxhash

    content = [str(acts.attributes.get("run_fingerprint")), str(acts.attributes["rows"]), *names]
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())
