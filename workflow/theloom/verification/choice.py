"""Which documents a verification recomputes: those at most risk first."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from theloom.corpus import batching
from theloom.corpus.batching import Batch
from theloom.dataset.activations import Activations
from theloom.model.length_switches import LengthSwitch


def choose_windows(
    acts: Activations, documents: int, seed: int, lengths: tuple[int, ...] = ()
) -> list[int]:
    """Choose one window each of several documents: by risk first, then at random.

    Args:
        acts: The run's activations.
        documents: How many documents to choose at most.
        seed: Of the random choice.
        lengths: Tokens beyond which the model attends or places tokens otherwise
            (`model.length_switches.notable_lengths`).

    Returns:
        Numbers of windows: the longest; the longest and the shortest that went in chunks; the
        shortest of the batch with most padding; on both sides of each of these lengths, the nearest
        ones; the first and the last of the fullest batch; then random ones. Of documents that have
        stored rows, and where these are pooled all windows of each.
    """
    chosen: dict[int, int] = {}
    offsets = acts.document_offset if acts.pooled else acts.window_offset
    at_random = np.random.default_rng(seed).permutation(acts.window_count)
    for window in chain(_at_risk(acts, lengths), at_random):
        if len(chosen) == documents:
            break
        document = acts.document_of_window(window)
        unit = document if acts.pooled else window
        if offsets[unit + 1] > offsets[unit]:
            chosen.setdefault(document, int(window))
    found = list(chosen.values())
    return whole_documents(acts, found) if acts.pooled else found


def _at_risk(acts: Activations, lengths: Iterable[int]) -> list[int]:
    """The windows that `choose_windows` has before random ones. Of the batches those alone are kept
    that may be chosen.
    """
    tokens = np.diff(acts.window_tokens)
    best: dict[str, tuple[int, tuple[int, ...]]] = {}

    def offer(what: str, score: int, windows: tuple[int, ...]) -> None:
        if what not in best or score > best[what][0]:
            best[what] = score, windows

    for batch, chunk in batches_of(acts):
        if batch.width > chunk:
            shortest = batch.lengths[-1]
            offer("longest streamed", batch.width, batch.windows[:1])
            first = batch.windows[batch.lengths.index(shortest)]
            offer("shortest streamed", -shortest, (first,))
        offer("padded", batch.tokens - sum(batch.lengths), batch.windows[-1:])
        offer("full", len(batch.windows), (batch.windows[0], batch.windows[-1]))

    def of(what: str) -> tuple[int, ...]:
        return best[what][1] if what in best else ()

    found = [int(tokens.argmax()), *of("longest streamed"), *of("shortest streamed")]
    found += of("padded")
    for length in sorted(lengths):
        below, above = np.flatnonzero(tokens <= length), np.flatnonzero(tokens > length)
        if len(below) and len(above):
            found += [int(below[tokens[below].argmax()]), int(above[tokens[above].argmin()])]
    return [*found, *of("full")]


def whole_documents(acts: Activations, windows: Iterable[int]) -> list[int]:
    """All windows of the documents of some windows.

    Args:
        acts: The run's activations.
        windows: Numbers of windows.

    Returns:
        Numbers of windows, document by document in the order in which `windows` has them.
    """
    documents = dict.fromkeys(map(acts.document_of_window, windows))
    return [int(w) for d in documents for w in np.flatnonzero(acts.window_document == d)]


def windows_of_shards(acts: Activations) -> np.ndarray:
    """Where the windows of each shard end.

    Args:
        acts: The run's activations.

    Returns:
        The number of the window after the last one of each shard, (shards,).
    """
    attributes = acts.attributes
    of_shard = "tokens" if "tokens" in attributes else "rows"
    sizes = attributes.by_shard(
        f"shard_{of_shard}" if f"shard_{of_shard}" in attributes else of_shard
    )
    return np.searchsorted(acts.window_tokens, np.cumsum(sizes))


def batches_of(acts: Activations) -> Iterator[tuple[Batch, int]]:
    """The batches in which a run's windows went through the model.

    Args:
        acts: The run's activations, or a single shard.

    Yields:
        Batches of numbers of windows in the dataset, each with the tokens of a chunk.
    """
    attributes = acts.attributes
    batch_tokens, chunks = attributes.by_shard("batch_tokens"), attributes.by_shard("chunk_size")
    switches = [LengthSwitch(**s) for s in json.loads(attributes.get("model_switches", "[]"))]
    together = int(attributes.get("streamed_windows", 1))
    ends = windows_of_shards(acts)
    first = 0
    for end, most, chunk in zip(ends, batch_tokens, chunks, strict=True):
        tokens = np.diff(acts.window_tokens[first : end + 1])
        for batch in batching.plan_batches(tokens, most, chunk, together, switches):
            yield Batch(tuple(first + w for w in batch.windows), batch.lengths), chunk
        first = int(end)
