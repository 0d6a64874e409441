"""The proof that two datasets have rows of the same tokens, in the same order.

Hidden states of two models can be compared, or trained on together, only where row r of both is the
same token after the same tokens. Files whose tables have equal checksums are equal. Otherwise the
tables are compared, and the first difference is named.
"""

import logging
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from theloom.errors import StoreError, printable
from theloom.rows.modality import INPUT_HASH, INPUT_IMAGES
from theloom.store import checksums

if TYPE_CHECKING:
    from theloom.dataset.reader import ActivationsReader

log = logging.getLogger(__name__)

_AT_ONCE = 1 << 22  # tokens in memory of each dataset


def check_same_tokens(first: "ActivationsReader", other: "ActivationsReader") -> None:
    """Check that two datasets have rows of the same tokens in the same windows.

    Names of documents may differ: their tokens are what the models saw.

    Args:
        first: a dataset.
        other: another one, of any model.

    Raises:
        StoreError: a row is of another token, or of the same token after others; with the first
            difference.
    """
    if first.pool != other.pool:
        _refuse(first, other, "rows.pool", f"is {first.pool}", other.pool)
    if not _equal_checksums(first, other):
        _compare_documents(first, other)
        _compare_windows(first, other)
        _compare_ids(first, other)
    _compare_inputs(first, other)
    _compare_rows(first, other)
    _warn_of_texts(first, other)


def _equal_checksums(first: "ActivationsReader", other: "ActivationsReader") -> bool:
    """Whether every file of one has tables with the checksum of the other's."""

    def tables(acts: "ActivationsReader") -> list[tuple[int, int]]:
        found = np.array([np.frombuffer(c, "<u8") for c in acts.checksums])
        return found[:, checksums.TABLES].tolist() if len(found) else []

    return len(first.checksums) > 0 and tables(first) == tables(other)


def _compare_documents(first: "ActivationsReader", other: "ActivationsReader") -> None:
    ours, theirs = np.diff(first.document_tokens), np.diff(other.document_tokens)
    common = min(len(ours), len(theirs))
    for number in np.flatnonzero(ours[:common] != theirs[:common])[:1].tolist():
        _refuse(
            first,
            other,
            _document(first, number),
            f"has {ours[number]:,} tokens",
            f"{theirs[number]:,}",
        )
    if len(ours) != len(theirs):
        _refuse(first, other, "the corpus", f"has {len(ours):,} documents", f"{len(theirs):,}")


def _compare_windows(first: "ActivationsReader", other: "ActivationsReader") -> None:
    ours, theirs = first.window_tokens, other.window_tokens
    if np.array_equal(ours, theirs):
        return
    common = min(len(ours), len(theirs))
    at = int(np.flatnonzero(ours[:common] != theirs[:common])[0])
    token = int(min(ours[at], theirs[at]))
    document, place = _place(first, token)
    _refuse(
        first,
        other,
        _document(first, document),
        f"{'begins' if token == ours[at] else 'does not begin'} a window at token {place}",
        "not so (corpus.context_length differs)",
    )


def _compare_ids(first: "ActivationsReader", other: "ActivationsReader") -> None:
    ours, theirs = first.token_ids, other.token_ids
    if first.codebooks != other.codebooks:
        here, there = (f"{a.codebooks or 1} ids a token" for a in (first, other))
        _refuse(first, other, "the corpus", f"has {here}", there)
    for start in range(0, len(ours), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        a, b = ours.numpy(part), theirs.numpy(part)
        if np.array_equal(a, b):
            continue
        at = int((a != b).nonzero()[0][0])
        document, place = _place(first, start + at)
        what = f"token {place} of {_document(first, document)}"
        _refuse(first, other, what, f"is {a[at]}", str(b[at]))


def _compare_inputs(first: "ActivationsReader", other: "ActivationsReader") -> None:
    """Images and clips are the same by the hashes of their files: the ids of rows are numbers, and
    those of images in conversations are all alike."""
    _compare_images(first, other)
    ours, theirs = first.columns.get(INPUT_HASH), other.columns.get(INPUT_HASH)
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        here, there = ("texts" if column is None else "files" for column in (ours, theirs))
        _refuse(first, other, "the corpus", f"is of {here}", there)
    a, b = np.array(ours.tolist()), np.array(theirs.tolist())
    for number in np.flatnonzero(a != b)[:1].tolist():
        has = f"is a file of SHA-256 {a[number][:16]}…"
        _refuse(first, other, _document(first, number), has, f"{b[number][:16]}…")


def _compare_images(first: "ActivationsReader", other: "ActivationsReader") -> None:
    """The images of conversations, by the hashes of their bytes."""

    def shown(acts: "ActivationsReader") -> list[list[str]] | None:
        column = acts.columns.get(INPUT_IMAGES)
        if column is None:
            return None
        return [[one["sha256"] for one in images] for images in column.tolist()]

    ours, theirs = shown(first), shown(other)
    for number in range(len(ours or theirs or ())):
        a, b = (found[number] if found else [] for found in (ours, theirs))
        if a != b:
            has = f"has images of SHA-256 {', '.join(one[:16] for one in a) or 'none'}"
            _refuse(
                first,
                other,
                _document(first, number),
                has,
                ", ".join(one[:16] for one in b) or "none",
            )


def _compare_rows(first: "ActivationsReader", other: "ActivationsReader") -> None:
    ours, theirs = first.row_tokens, other.row_tokens
    if ours is None and theirs is None:
        return
    ours = np.arange(len(first)) if ours is None else ours
    theirs = np.arange(len(other)) if theirs is None else theirs
    if np.array_equal(ours, theirs):
        return
    common = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:common] != theirs[:common])
    if not len(differ):
        _refuse(first, other, "the selection", f"has {len(ours):,} rows", f"{len(theirs):,}")
    at = int(differ[0])
    _refuse(first, other, f"row {at}", f"is of token {ours[at]}", f"of token {theirs[at]}")


def _warn_of_texts(first: "ActivationsReader", other: "ActivationsReader") -> None:
    """Equal ids that stand for other texts: the models have other tokenizers, perhaps by intent."""
    ours, theirs = first.token_texts, other.token_texts
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            log.warning(
                "%s and %s have the same token ids, but %d stands for %r and %r",
                first.path,
                other.path,
                token,
                ours[token],
                theirs[token],
            )
            return


def _place(acts: "ActivationsReader", token: int) -> tuple[int, int]:
    """The document of a token, and its number in the document."""
    document = int(np.searchsorted(acts.document_tokens, token, "right")) - 1
    return document, token - int(acts.document_tokens[document])


def _document(acts: "ActivationsReader", number: int) -> str:
    return f"document {printable(acts.document_id_of(number))!r}"


def _refuse(
    first: "ActivationsReader", other: "ActivationsReader", what: str, is_: str, there: str
) -> NoReturn:
    raise StoreError(
        f"rows of {first.path} and {other.path} are not of the same tokens: {what} {is_} in the "
        f"first and {there} in the second; extract both from the same corpus and tokenizer, with "
        "the same corpus.* and rows.* settings"
    )
