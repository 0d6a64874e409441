"""Documents to token ids: `tokens.h5`, with windows for what is longer than the context, and the
plan of shards.

A *document* is one text of the corpus. A *window* is what one forward pass sees: the whole
document, or a part of it where it is longer than the context. A *shard* is a range of whole
documents.
"""

import json
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from theloom.config.frozen import to_plain
from theloom.config.model_dims import numbers
from theloom.config.schema import Config, RowsConfig
from theloom.corpus import documents
from theloom.corpus.batching import Lengths
from theloom.corpus.columns import Columns
from theloom.corpus.encoding import Encoded, Encoder
from theloom.corpus.kept import KeptRows
from theloom.corpus.media import documents as media
from theloom.corpus.media.chats import ChatEncoder
from theloom.corpus.media.encoding import Encoder as MediaEncoder
from theloom.corpus.prompts import Prompts
from theloom.corpus.rows import Document
from theloom.corpus.spooled.spool import Numbers, Strings
from theloom.corpus.targets.encoding import Targets
from theloom.corpus.targets.sources import source_lengths
from theloom.corpus.tokenizer import COMPARED
from theloom.corpus.vocabulary import Vocabulary
from theloom.corpus.windows import write_tables
from theloom.errors import ConfigError, CorpusError, printable
from theloom.model.files import hf_config
from theloom.model.length_switches import length_switches
from theloom.rows.document import Document as RowDocument
from theloom.rows.modality import CHAT, SENSED
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
_WINDOWS = 1 << 18  # windows whose lengths are read together
_HASHED = 1 << 20  # bytes that are hashed together
_NOT_IN_SHARDS = ("documents/text_hash", "shards/first_document")


@dataclass
class Tally:
    """What has been tokenised so far.

    Attributes:
        columns: values of `corpus.columns`.
        targets: where the rows are a decoder's; it has the sources.
        ids: of the documents.
        hashes: of their texts.
        lengths: tokens of each document.
        empty: documents without tokens.
        doubled: documents for which `Encoder.begins_twice`.
        cut_from: tokens of the last document before it was cut at `corpus.max_tokens`; 0: it was
            not.
    """

    columns: Columns
    targets: Targets | None = None
    ids: Strings = field(default_factory=Strings)
    hashes: Strings = field(default_factory=Strings)
    lengths: Numbers = field(default_factory=Numbers)
    empty: int = 0
    doubled: int = 0
    cut_from: int = 0

    @property
    def total(self) -> int:
        """Tokens."""
        return self.lengths.total

    def skip(self, document: Document) -> None:
        """Count a document without tokens.

        Args:
            document: the document.
        """
        self.empty += 1
        log.warning("document %s has no tokens: skipped", printable(document.id))

    def add(self, document: Document, text_hash: str, tokens: int, doubled: bool) -> None:
        """Count a document.

        Args:
            document: the document.
            text_hash: of what was encoded.
            tokens: how many are taken.
            doubled: whether it begins with the token that the tokenizer puts before it.
        """
        self.ids.append(document.id)
        self.hashes.append(text_hash)
        self.lengths.append(tokens)
        self.doubled += doubled


Tokens = Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]
"""Token ids of one document after the other, or of several, with the other tables by name."""


def tokenize(config: Config, output: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write `tokens.h5`: the stage tokenize_corpus, in one job.

    Args:
        config: the settings of the stage.
        output: the file.
        more: attributes of the file beside those of every one.

    Raises:
        CorpusError: the corpus cannot be read or has no tokens, the model has no tokenizer, or a
            token has no row in the model's embedding.
        ConfigError: corpus.context_length is more than the model allows.
    """

    def whole(encoder: Any, tally: Tally, kept: KeptRows, prompts: Prompts | None) -> Tokens:
        if config.corpus.kind.name in SENSED:
            return media.encoded(config, encoder, tally, kept)
        corpus = documents.settings(config.corpus) if prompts is None else prompts.corpus
        read = documents.read_documents(corpus)
        return encoded(config, encoder, tally, kept, prompts, read)

    write_tokens(config, output, whole, more or {})


def write_tokens(
    config: Config,
    output: Path,
    source: Callable[[Any, Tally, KeptRows, Prompts | None], Tokens],
    more: Mapping[str, Any],
) -> None:
    """Write `tokens.h5` from any source of tokens.

    Args:
        config: the settings of the stage.
        output: the file.
        source: gives the tokens of all documents, and counts what it gives.
        more: attributes of the file beside those of every one.

    Raises:
        CorpusError: the corpus cannot be read or has no tokens, the model has no tokenizer, or a
            token has no row in the model's embedding.
        ConfigError: corpus.context_length is more than the model allows.
    """
    sensed = config.corpus.kind.name in SENSED
    encoder: Any = _encoder_of(config)(config)
    context = 0 if sensed else context_length(config)
    prompts = None if config.answers.source is None else Prompts(config, context)
    rows = config.rows if prompts is None else RowsConfig()  # kept when the answers are there
    targets = Targets(config, encoder, context) if config.corpus.target is not None else None
    tally = Tally(Columns(config.corpus.columns), targets)
    with written(output) as file:
        growing = Growing(file)
        kept = KeptRows(rows, file)
        ids_hash, occurring = xxhash.xxh3_128(), set[int]()
        for input_ids, tables in source(encoder, tally, kept, prompts):
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
        typed = tally.columns.typed() | encoder.columns()
        typed |= {} if targets is None else targets.columns()
        columns.write_pieces(file, typed)
        token_texts.write(file, encoder.texts(occurring))
        file_format.set_attributes(
            file,
            provenance.attributes(
                "tokens",
                config=to_plain(config),
                **encoder.attributes(),
                double_bos_documents=tally.doubled,
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
                **more,
            ),
        )
    encoder.report(tally.doubled)
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


def _encoder_of(config: Config) -> Any:
    """The class that turns documents into rows."""
    if config.corpus.kind.name in SENSED:
        return MediaEncoder
    modality = config.model.modality
    return ChatEncoder if modality is not None and modality.name == CHAT else Encoder


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


def encoded(
    config: Config,
    encoder: Encoder,
    tally: Tally,
    kept: KeptRows,
    prompts: Prompts | None,
    read: Iterable[Document],
    cut: bool = True,
) -> Tokens:
    """The tokens of documents, until `corpus.max_tokens` are there.

    Args:
        config: the settings of the stage.
        encoder: of the run.
        tally: takes the counts; what it has is before the first document.
        kept: takes what is stored.
        prompts: takes the documents of a run with answers.
        read: the documents.
        cut: whether the last document is cut at `corpus.max_tokens`, or whole.

    Yields:
        Token ids of each document that has any, with the other tables of its tokens.

    Raises:
        CorpusError: a document cannot be read or encoded.
    """
    left, vocabulary = config.corpus.max_tokens, Vocabulary(config.model)
    names, targets, context = [*config.corpus.columns], tally.targets, context_length(config)
    encode = encoder.encode if targets is None else targets.encode
    left = None if left is None else left - tally.total
    for document, found in _one_by_one(encode, _groups(read)):
        ids = found.ids
        if not ids:
            tally.skip(document)
            continue
        if left is not None and len(ids) > left and cut:
            if prompts is not None or found.images:
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
            prompts.add(document, len(ids), found.text, given)
        checked = vocabulary.check(ids, printable(document.id), encoder.names)
        tables = {name: table[: len(ids)] for name, table in found.tables.items()}
        tables |= encoder.special(checked)
        known = RowDocument(
            id=document.id,
            tokens=len(ids),
            text=found.text,
            columns=dict(zip(names, document.columns or (), strict=False)),
            **tables,
        )
        tally.columns.add(document)
        encoder.add(document, found, context)
        if targets is not None:
            targets.add(document, len(ids), vocabulary, encoder.names)
        tables |= kept.add(known)
        text_hash = xxhash.xxh3_128_hexdigest(found.hashed)
        tally.add(document, text_hash, len(ids), encoder.begins_twice(found.ids))
        yield checked, tables
        if left is not None:
            left -= len(ids)
            if left <= 0:
                return


def _one_by_one(
    encode: Callable[[Sequence[Document]], list[Encoded]], groups: Iterable[list[Document]]
) -> Iterator[tuple[Document, Encoded]]:
    """Documents and their tokens. An error comes after those before it, which may be all that is
    taken of the corpus.
    """
    for group in groups:
        try:
            found = encode(group)
        except CorpusError:
            for document in group:
                yield document, encode([document])[0]
            raise
        yield from zip(group, found, strict=True)


def first_group(read: Iterable[Document]) -> list[Document]:
    """The documents that are encoded first, of which class and file of the tokenizer are compared.

    Args:
        read: the documents of the corpus.

    Returns:
        The first of them.
    """
    return next(_groups(read), [])


def _groups(read: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are encoded together; of the first group class and file are compared."""
    group, characters, least = list[Document](), 0, COMPARED
    try:
        for document in read:
            group.append(document)
            characters += len(document.text) + (_CHARACTERS if document.images else 0)
            if len(group) == _TOGETHER or (len(group) >= least and characters >= _CHARACTERS):
                yield group
                group, characters, least = [], 0, 1
    except CorpusError:
        if group:
            yield group
        raise
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
        step = max(1, _HASHED // dataset.dtype.itemsize)
        for start in range(0, len(dataset), step):
            state.update(dataset[start : start + step].tobytes())

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
    windows = _range(file["windows/document"], first, last)
    window_offset = file["windows/offset"][windows.start : windows.stop + 1]
    input_ids = file["tokens/input_ids"][rows]
    more = {
        name: file[token_tables.path(name)][rows]
        for name in token_tables.TYPES
        if token_tables.path(name) in file
    }
    listed = json.loads(file.attrs.get("columns", "[]"))

    def of_shard(name: str) -> np.ndarray | None:
        if name not in file:
            return None
        whole = name.startswith(columns.NAMES)  # of categories
        values: np.ndarray = file[name][:] if whole else file[name][first:last]
        return values

    texts = token_texts.read(lambda name: file[name][:]) if token_texts.GROUP in file else {}
    first_row, row_token = rows.start, None
    if token_tables.ROW_TOKEN in file:
        of_all = file[token_tables.ROW_TOKEN]
        kept = _range(of_all, rows.start, rows.stop)
        first_row, row_token = kept.start, of_all[kept] - rows.start
    return ShardTokens(
        first_row=first_row,
        input_ids=input_ids,
        document=file["tokens/document"][rows],
        position=file["tokens/position"][rows],
        document_offset=document_offset - rows.start,
        document_id=file["documents/id"][first:last],
        window_offset=window_offset - rows.start,
        window_document=file["windows/document"][windows],
        texts={n: texts[n] for n in np.unique(input_ids).tolist() if n in texts},
        columns=columns.read(of_shard, listed, last - first),
        row_token=row_token,
        **more,
    )


def _range(ascending: h5py.Dataset, first: int, last: int) -> slice:
    """Where a sorted dataset has values from `first` on, and below `last`: it is not read whole."""
    return slice(bisect_left(ascending, first), bisect_left(ascending, last))


def _longest(file: h5py.File) -> int:
    """Tokens of the longest window; 1 at least."""
    offsets, longest = file["windows/offset"], 1
    for start in range(0, len(offsets) - 1, _WINDOWS):
        piece = np.diff(offsets[start : start + _WINDOWS + 1])
        longest = max(longest, int(piece.max()))
    return longest


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
        longest = _longest(file)
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
