"""Which documents a verification recomputes: those at most risk first."""

import json
from collections.abc import Iterable, Iterator

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
    tokens = np.diff(acts.window_tokens)
    batches = list(batches_of(acts))
    wanted = [int(tokens.argmax())]
    streamed = [w for batch, chunk in batches if batch.width > chunk for w in batch.windows]
    if streamed:
        wanted += [max(streamed, key=lambda w: tokens[w]), min(streamed, key=lambda w: tokens[w])]
    if batches:
        padded = max(batches, key=lambda b: b[0].tokens - sum(b[0].lengths))[0]
        wanted.append(padded.windows[-1])
    for length in sorted(lengths):
        below, above = np.flatnonzero(tokens <= length), np.flatnonzero(tokens > length)
        if len(below) and len(above):
            wanted += [int(below[tokens[below].argmax()]), int(above[tokens[above].argmin()])]
    if batches:
        full = max(batches, key=lambda b: len(b[0].windows))[0]
        wanted += [full.windows[0], full.windows[-1]]
    wanted += [int(w) for w in np.random.default_rng(seed).permutation(len(tokens))]
    chosen: dict[int, int] = {}
    rows = np.diff(acts.document_offset if acts.pooled else acts.window_offset)
    for window in wanted:
        document = int(acts.window_document[window])
        if rows[document if acts.pooled else window]:
            chosen.setdefault(document, window)
    found = list(chosen.values())[:documents]
    return whole_documents(acts, found) if acts.pooled else found


def whole_documents(acts: Activations, windows: Iterable[int]) -> list[int]:
    """All windows of the documents of some windows.

    Args:
        acts: The run's activations.
        windows: Numbers of windows.

    Returns:
        Numbers of windows, document by document in the order in which `windows` has them.
    """
    documents = dict.fromkeys(int(acts.window_document[w]) for w in windows)
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
