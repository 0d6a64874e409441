"""Documents to token ids: `tokens.h5`, with windows for what is longer than the context, and the
plan of shards.

A *document* is one text of the corpus. A *window* is what one forward pass sees: the whole
document, or a part of it where it is longer than the context. A *shard* is a range of whole
documents.
"""

import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from theloom.config.frozen import to_plain
from theloom.config.model_dims import numbers
from theloom.config.schema import Config, RowsConfig
from theloom.corpus.batching import Lengths
from theloom.corpus.columns import Columns
from theloom.corpus.documents import read_documents
from theloom.corpus.encoding import Encoder
from theloom.corpus.kept import KeptRows
from theloom.corpus.prompts import Prompts
from theloom.corpus.rows import Document
from theloom.corpus.targets.encoding import Targets
from theloom.corpus.targets.sources import source_lengths
from theloom.corpus.tokenizer import COMPARED
from theloom.corpus.vocabulary import Vocabulary
from theloom.corpus.windows import Strings, write_tables
from theloom.errors import ConfigError, CorpusError, printable
from theloom.model.files import hf_config
from theloom.model.length_switches import length_switches
from theloom.rows.document import Document as RowDocument
from theloom.store import file_format, provenance, token_texts
from theloom.store.hdf5.output import written
from theloom.store.shard_file import ShardTokens
from theloom.store.tables import columns
from theloom.store.tables import tokens as token_tables

log = logging.getLogger(__name__)

# Documents that the tokenizer encodes in parallel, and their characters, unless one has more: with
# the characters of tokens, which come as Python's integers, each takes about 300 bytes
_TOGETHER, _CHARACTERS = 256, 1 << 18
_BUFFERED = token_tables.CHUNK  # tokens that are written together
_NOT_IN_SHARDS = ("documents/text_hash", "shards/first_document")


@dataclass
class _Tally:
    """What has been tokenised so far."""

    columns: Columns
    ids: Strings = field(default_factory=Strings)
    hashes: Strings = field(default_factory=Strings)
    lengths: MutableSequence[int] = field(default_factory=lambda: array("q"))
    empty: int = 0
    cut_from: int = 0  # tokens of the last document before it was cut at max_tokens; 0: not cut

    @property
    def total(self) -> int:
        return sum(self.lengths)


def tokenize(config: Config, output: Path) -> None:
    """Write `tokens.h5`: the stage tokenize_corpus.

    Args:
        config: the settings of the stage.
        output: the file.

    Raises:
        CorpusError: the corpus cannot be read or has no tokens, the model has no tokenizer, or a
            token has no row in the model's embedding.
        ConfigError: corpus.context_length is more than the model allows.
    """
    encoder, context = Encoder(config), context_length(config)
    prompts = None if config.answers.source is None else Prompts(config, context)
    rows = config.rows if prompts is None else RowsConfig()  # kept when the answers are there
    tally = _Tally(Columns(config.corpus.columns))
    targets = Targets(config, encoder, context) if config.corpus.target is not None else None
    with written(output) as file:
        growing = Growing(file)
        kept = KeptRows(rows, file)
        ids_hash, occurring = xxhash.xxh3_128(), set[int]()
        for input_ids, tables in _encoded(config, encoder, tally, kept, prompts, targets):
            growing.add({"input_ids": input_ids, **tables})
            file.check()
            ids_hash.update(input_ids.tobytes())
            occurring.update(np.unique(input_ids).tolist())
        growing.write()
        total = tally.total
        if not total:
            read = f"{tally.empty} documents read, all empty" if tally.empty else "no documents"
            raise CorpusError(f"the corpus has no tokens: {read}; check corpus.*")
        # composing the config has set the number of shards
        shards = config.extraction.shards or 1
        write_tables(file, tally.ids, tally.hashes, tally.lengths, context, shards)
        if prompts is not None:
            prompts.write(file)
        typed = tally.columns.typed() | ({} if targets is None else targets.columns())
        columns.write(file, typed)
        token_texts.write(file, encoder.texts(occurring))
        file_format.set_attributes(
            file,
            provenance.attributes(
                "tokens",
                config=to_plain(config),
                **encoder.attributes(),
                columns=columns.described(typed),
                tables_hash=tables_hash(file),
                corpus=config.corpus.kind.name,
                tokens_hash=ids_hash.hexdigest(),
                corpus_hash=tally.hashes.digest(),
                empty_documents=tally.empty,
                truncated_from=tally.cut_from,
                context_length=context,
                **({} if targets is None else targets.attributes()),
                **kept.finish(len(tally.ids)),
            ),
        )
    encoder.report()
    log.info(
        "%d tokens in %d documents; %d empty documents skipped", total, len(tally.ids), tally.empty
    )


def context_length(config: Config) -> int:
    """Tokens of the longest window: `corpus.context_length`, else the model's own limit.

    Args:
        config: the run's config.

    Returns:
        Tokens; 0: there is no limit.

    Raises:
        ConfigError: more is requested than the model takes.
        ModelError: the model's own config cannot be read.
    """
    model_config, requested = hf_config(config.model), config.corpus.context_length
    limit = numbers(model_config).context_length
    scales = any(s.every_length and s.beyond == limit for s in length_switches(model_config))
    if requested and limit and requested > limit and not scales:
        raise ConfigError(
            f"corpus.context_length: {requested} is more than the model's {limit}; "
            "give at most that"
        )
    return requested or limit


class Growing:
    """The datasets with an entry for each token, which grow by what is added."""

    def __init__(self, file: h5py.File) -> None:
        self._file, self._total, self._waiting = file, 0, 0
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, tables: Mapping[str, np.ndarray]) -> None:
        """Take the tables of a document.

        Args:
            tables: by name, each (tokens,) or with one more dimension; `input_ids` among them.
        """
        for name, values in tables.items():
            self._parts.setdefault(name, []).append(values)
        self._waiting += len(tables["input_ids"])
        if self._waiting >= _BUFFERED:
            self.write()

    def write(self) -> None:
        """Write what was added since the last time."""
        for name, parts in self._parts.items():
            path, kind = token_tables.path(name), token_tables.TYPES.get(name, "<i4")
            if path not in self._file:
                self._file.create_dataset(path, (0,), kind, maxshape=(None,), chunks=(_BUFFERED,))
            self._file[path].resize((self._total + self._waiting,))
            self._file[path][self._total :] = np.concatenate(parts)
        self._total, self._waiting, self._parts = self._total + self._waiting, 0, {}


def _encoded(
    config: Config,
    encoder: Encoder,
    tally: _Tally,
    kept: KeptRows,
    prompts: Prompts | None,
    targets: Targets | None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The token ids of each document that has any, with the other tables of its tokens, until
    max_tokens; counts go to `tally`, and what is stored to `kept`.
    """
    left, vocabulary = config.corpus.max_tokens, Vocabulary(config.model)
    documents = read_documents(config.corpus if prompts is None else prompts.corpus)
    for group in _groups(documents):
        encode = encoder.encode if targets is None else targets.encode
        for document, encoded in zip(group, encode(group), strict=True):
            ids = encoded.ids
            if not ids:
                tally.empty += 1
                log.warning("document %s has no tokens: skipped", printable(document.id))
                continue
            if left is not None and len(ids) > left:
                if prompts is not None:
                    log.info("documents end before %s, at corpus.max_tokens", document.id)
                    return
                log.warning(
                    "document %s is cut from %d to %d tokens at corpus.max_tokens",
                    printable(document.id),
                    len(ids),
                    left,
                )
                tally.cut_from = len(ids)
                ids = ids[:left]
            if prompts is not None:
                document, given = prompts.split(document)
                prompts.add(document, len(ids), encoded.text, given)
            checked = vocabulary.check(ids, printable(document.id), encoder.names)
            tally.ids.append(document.id)
            tally.hashes.append(xxhash.xxh3_128_hexdigest(encoded.hashed))
            tally.lengths.append(len(ids))
            tally.columns.add(document)
            if targets is not None:
                targets.add(document, len(ids), vocabulary, encoder.names)
            tables = {name: table[: len(ids)] for name, table in encoded.tables.items()}
            tables |= encoder.special(checked)
            known = RowDocument(
                id=document.id,
                tokens=len(ids),
                text=encoded.text,
                columns=dict(zip(config.corpus.columns, document.columns or (), strict=False)),
                **tables,
            )
            yield checked, tables | kept.add(known)
            if left is not None:
                left -= len(ids)
                if left == 0:
                    return


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are encoded together; of the first group class and file are compared."""
    group, characters, least = list[Document](), 0, COMPARED
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _TOGETHER or (len(group) >= least and characters >= _CHARACTERS):
            yield group
            group, characters, least = [], 0, 1
    if group:
        yield group


def tables_hash(file: h5py.File) -> str:
    """A hash of what goes with the tokens into every file: ids, columns, roles, characters.

    Args:
        file: the open `tokens.h5`.

    Returns:
        128 bits of XXH3, in hexadecimal digits.
    """
    state = xxhash.xxh3_128(str(file["documents/id"].dtype).encode())

    def add(dataset: h5py.Dataset) -> None:
        for start in range(0, len(dataset), _BUFFERED):
            state.update(dataset[start : start + _BUFFERED].tobytes())

    add(file["documents/id"])
    for name in token_tables.TYPES:
        if (path := token_tables.path(name)) in file:
            state.update(name.encode())
            add(file[path])
    for group in (columns.GROUP, columns.NAMES, columns.NULL):
        for name, dataset in sorted(file[group].items()) if group in file else ():
            state.update(f"{group}/{name} {dataset.dtype}".encode())
            add(dataset)
    return state.hexdigest()


def _shard(file: h5py.File, shard: int) -> ShardTokens:
    first, last = (int(d) for d in file["shards/first_document"][shard : shard + 2])
    document_offset = file["documents/offset"][first : last + 1]
    rows = slice(int(document_offset[0]), int(document_offset[-1]))
    window_document = file["windows/document"][:]
    windows = slice(*(int(w) for w in np.searchsorted(window_document, [first, last])))
    window_offset = file["windows/offset"][windows.start : windows.stop + 1]
    input_ids = file["tokens/input_ids"][rows]
    more = {
        name: file[token_tables.path(name)][rows]
        for name in token_tables.TYPES
        if token_tables.path(name) in file
    }
    listed = json.loads(file.attrs.get("columns", "[]"))
    count = len(file["documents/offset"]) - 1
    found = columns.read(lambda n: file[n][:] if n in file else None, listed, count)
    texts = token_texts.read(lambda name: file[name][:]) if token_texts.GROUP in file else {}
    first_row, row_token = rows.start, None
    if token_tables.ROW_TOKEN in file:
        of_all = file[token_tables.ROW_TOKEN][:]
        first_row, last_row = (int(r) for r in np.searchsorted(of_all, [rows.start, rows.stop]))
        row_token = of_all[first_row:last_row] - rows.start
    return ShardTokens(
        first_row=first_row,
        input_ids=input_ids,
        document=file["tokens/document"][rows],
        position=file["tokens/position"][rows],
        document_offset=document_offset - rows.start,
        document_id=file["documents/id"][first:last],
        window_offset=window_offset - rows.start,
        window_document=window_document[windows],
        texts={n: texts[n] for n in np.unique(input_ids).tolist() if n in texts},
        columns={name: column.part(slice(first, last)) for name, column in found.items()},
        row_token=row_token,
        **more,
    )


@dataclass(frozen=True)
class JobTokens:
    """What an extraction job needs of `tokens.h5`."""

    attributes: dict[str, Any]
    longest_window: int  # tokens, of the whole corpus
    shard: ShardTokens
    answered_by: str | None = None  # fingerprint of the model whose answers they hold


def read_job(path: Path, shard: int) -> JobTokens:
    """Read what an extraction job needs of `tokens.h5`, opening it once.

    Args:
        path: of `tokens.h5`.
        shard: number of the shard, from 0.

    Returns:
        The tokens of the shard, the attributes, and tokens of the run's longest window.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        longest = int(np.diff(file["windows/offset"][:]).max(initial=1))
        answered_by = file["answers"].attrs.get("model_fingerprint") if "answers" in file else None
        return JobTokens(_attributes(file), longest, _shard(file, shard), answered_by)


def window_lengths(path: Path) -> Lengths:
    """The lengths of all windows, shard by shard, by which passes are planned.

    Args:
        path: of `tokens.h5`.

    Returns:
        Lengths in tokens; of a decoder's window that of its source where it is longer.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        lengths = np.diff(file["windows/offset"][:])
        if (sources := source_lengths(file.get)) is not None:
            lengths = np.maximum(lengths, sources[file["windows/document"][:]])
        ends = np.searchsorted(file["windows/document"][:], file["shards/first_document"][1:-1])
        return Lengths(tuple(np.split(lengths, ends)))


@dataclass(frozen=True)
class Sizes:
    """How much a run stores: rows, tokens, windows, and the bytes of the tables of `tokens.h5` that
    go into its shards.
    """

    rows: int
    tokens: int
    windows: int
    tables: int


def sizes(path: Path) -> Sizes:
    """How much a run stores.

    Args:
        path: of `tokens.h5`.

    Returns:
        Rows, tokens and windows, and the bytes of what goes with the tokens into the shards.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        count, windows = len(file["tokens/input_ids"]), len(file["windows/document"])
        found: dict[str, int] = {}

        def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset) and name not in _NOT_IN_SHARDS:
                found[name] = item.size * item.dtype.itemsize

        file.visititems(add)
        return Sizes(int(file.attrs.get("rows", count)), count, windows, sum(found.values()))


def attributes(path: Path) -> dict[str, Any]:
    """The attributes of `tokens.h5`.

    Args:
        path: of `tokens.h5`.

    Returns:
        Plain Python values by name.

    Raises:
        StoreError: the file is missing or of another format.
    """
    with file_format.open_h5(path, "tokens") as file:
        return _attributes(file)


def _attributes(file: h5py.File) -> dict[str, Any]:
    return {
        name: value.item() if hasattr(value, "item") else value
        for name, value in file.attrs.items()
    }
