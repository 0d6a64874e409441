"""Disk of a run from its config alone: rows, tables, sampled answers, and whether they fit."""

from collections.abc import Sequence
from pathlib import Path

from theloom.config.schema import Config
from theloom.errors import MemoryPlanError
from theloom.hooks.points import HookPoint
from theloom.model.checkpoint.codes import codebooks
from theloom.model.files import hf_config
from theloom.rows import expression
from theloom.store import statistics
from theloom.store.shard_file import bytes_of_window
from theloom.store.tables import tokens as token_tables

_OF_DOCUMENT = 8 + 8 + 8 + 4  # bytes: offsets of document and window, an id, the window's document

# Bytes of an answer in its shard's file and in answers.h5: number, sample, seed, reason, offsets,
# id, hash, window, columns; of each of its tokens: log-probability twice, id once more, text
_OF_ANSWER, _OF_SAMPLED = 300, 4 + 4 + 4 + 6
LINE = 32  # bytes of a sampled token in the lines of an unfinished shard


def answer_tokens(config: Config) -> int:
    """Count the tokens of an answer at most.

    Args:
        config: the run's config.

    Returns:
        Tokens; 0 for a run without answers.
    """
    return config.answers.max_new_tokens if config.answers.source is not None else 0


def most_documents(config: Config) -> int | None:
    """Bound the documents that are extracted, answers included.

    Args:
        config: the run's config.

    Returns:
        The most documents; None: nothing bounds them.
    """
    documents = config.corpus.max_documents
    if config.answers.source is None or documents is None:
        return documents
    # how many answers a column holds is not known
    return documents * config.answers.samples if config.answers.source.name == "model" else None


def most_tokens(config: Config) -> int | None:
    """Bound the tokens that are extracted, answers included.

    Args:
        config: the run's config.

    Returns:
        The most tokens; None: nothing bounds them.
    """
    tokens, documents = config.corpus.max_tokens, most_documents(config)
    if config.answers.source is None or tokens is None:
        return tokens
    if documents is None:
        return None
    return config.answers.samples * tokens + documents * answer_tokens(config)


def most_sampled(config: Config) -> int | None:
    """Bound the tokens that the run's own model samples.

    Args:
        config: the run's config.

    Returns:
        The most tokens; None: nothing bounds them.
    """
    documents = most_documents(config)
    return None if documents is None else documents * answer_tokens(config)


def most_rows(config: Config) -> int | None:
    """Bound the rows that a run can store, by `max_tokens`, `max_documents` and `rows.keep`.

    Args:
        config: the run's config.

    Returns:
        The most rows; None: nothing bounds them.
    """
    of_document = expression.parse(config.rows.keep).most
    if config.rows.pool.name != "none" and config.rows.by.name == "document":
        of_document = 1
    documents, bounds = most_documents(config), [most_tokens(config)]
    if of_document is not None and documents is not None:
        bounds.append(of_document * documents)
    return min((n for n in bounds if n is not None), default=None)


def token_bytes(config: Config) -> int:
    """Count the bytes on disk of the tables for one token.

    Args:
        config: the run's config.

    Returns:
        Bytes.
    """
    return token_tables.bytes_of_token(_tables(config), _codebooks(config))


def _codebooks(config: Config) -> int:
    """Codes of a token; 0: it has one id. A profile that declares its model has no codes."""
    if config.corpus.input_ids is None or config.model.architecture is not None:
        return 0
    return codebooks(hf_config(config.model))


_ANSWER_TABLES = ("role", "generated")  # tables of tokens that runs with answers have


def _tables(config: Config) -> list[str]:
    """The tables of tokens that a run stores."""
    names = ["special"]
    if config.corpus.input_ids is None:
        names += ["char_start", "char_end"]
    if config.corpus.messages is not None:
        names += ["role", "message"]
    if config.answers.source is not None:
        names += _ANSWER_TABLES
    if not (expression.parse(config.rows.keep).keeps_all and config.rows.pool.name == "none"):
        names.append("kept")
    return list(dict.fromkeys(names))


def table_bytes(config: Config, points: Sequence[HookPoint], context: int) -> int:
    """Bytes on disk of all tables, as far as the config bounds them: of tokens, of documents with a
    window each, and the statistics of each shard.

    Args:
        config: the run's config.
        points: its hook points.
        context: tokens of the longest window.

    Returns:
        Bytes.
    """
    rows, documents = most_rows(config), most_documents(config) or 0
    tokens = most_tokens(config) or rows or 0
    of_row = 8 if "kept" in _tables(config) else 0
    of_document = bytes_of_window(len(points)) + _OF_DOCUMENT
    elements = sum(p.width(context) for p in points) * statistics.bytes_of_element()
    shards = config.extraction.shards or 1
    return (
        tokens * token_bytes(config)
        + of_row * (rows or 0)
        + min(documents, tokens) * of_document
        + shards * elements
    )


def answers_bytes(config: Config, answers: int, tokens: int, sampled: int) -> int:
    """Bytes of `answers.h5`, and of the files of the shards that it is made from.

    Args:
        config: the run's config.
        answers: how many there are.
        tokens: of all answers with their prompts.
        sampled: tokens of the answers alone.

    Returns:
        Bytes.
    """
    tables = {*_tables(config), *_ANSWER_TABLES}
    # positions are written at once, the documents of tokens not at all, all others in chunks
    in_chunks = token_tables.bytes_of_token(tables) - 2 * 4
    whole = -(-tokens // token_tables.CHUNK) * token_tables.CHUNK
    return answers * _OF_ANSWER + whole * in_chunks + tokens * 4 + sampled * _OF_SAMPLED


def most_answers_bytes(config: Config) -> int | None:
    """Bound `answers_bytes` of a run whose own model samples answers.

    Args:
        config: the run's config.

    Returns:
        The most bytes; None: nothing bounds them.
    """
    answers, tokens, sampled = most_documents(config), most_tokens(config), most_sampled(config)
    if answers is None or tokens is None or sampled is None:
        return None
    return answers_bytes(config, answers, tokens, sampled)


def check_disk(folder: Path, needed: int, free: int) -> None:
    """Check that the output fits the disk.

    Args:
        folder: where the output goes.
        needed: bytes of the output.
        free: bytes free there.

    Raises:
        MemoryPlanError: it does not fit.
    """
    if needed > free:
        raise MemoryPlanError(
            f"the run writes {needed / 1e9:.3f} GB and {folder} has {free / 1e9:.3f} GB free; "
            "request fewer tokens (corpus.max_tokens), fewer hook points or a smaller store.dtype"
        )
