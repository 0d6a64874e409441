"""Batches hold every window once, within the token budget, in an order set by the lengths."""

import numpy as np
import pytest
from theloom.corpus.batching import PASS_TOKENS, padded, plan_batches


@pytest.mark.parametrize("seed", range(20))
def test_every_window_is_in_one_batch_within_the_budget_longest_first(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 400, size=random.integers(1, 60))
    budget, chunk = int(random.integers(1, 600)), int(random.integers(1, 300))
    batches = plan_batches(lengths, budget, chunk)
    assert sorted(w for b in batches for w in b.windows) == list(range(len(lengths)))
    assert [b.width for b in batches] == sorted((b.width for b in batches), reverse=True)
    for batch in batches:
        assert batch.lengths == tuple(lengths[list(batch.windows)])
        assert len(batch.windows) == 1 or len(batch.windows) * batch.width <= budget
        assert len(batch.windows) == 1 or batch.width <= chunk
        assert batch.tokens - sum(batch.lengths) <= PASS_TOKENS


def test_padding_stays_a_small_share_of_a_corpus_of_mixed_lengths():
    lengths = np.round(2 ** np.random.default_rng(0).uniform(4, 11, size=500)).astype(int)
    batches = plan_batches(lengths, 4096, 4096)
    assert sum(b.tokens for b in batches) < 1.05 * lengths.sum()
    assert np.mean([b.tokens for b in batches]) > 1024


def test_no_windows_give_no_batches():
    assert plan_batches(np.array([], int), 100, 10) == []


def test_padding_is_on_the_right():
    ids = np.arange(1, 8, dtype="<i4")
    (batch,) = plan_batches(np.array([2, 4, 1]), 100, 10)
    assert padded(batch, ids, np.array([0, 2, 6, 7])).tolist() == [
        [3, 4, 5, 6],
        [1, 2, 0, 0],
        [7, 0, 0, 0],
    ]
