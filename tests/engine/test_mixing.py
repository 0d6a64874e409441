"""Rows that are computed next to each other come apart: how well is measured."""

import numpy as np
import pytest
import torch
from theloom.engine.mixing import mixed


@pytest.mark.parametrize(("buffer", "most"), [(1024, 0.12), (4096, 0.03)])
def test_a_larger_buffer_mixes_better_and_each_row_comes_once(buffer, most):
    blocks = ({"row": torch.arange(start, start + 128)} for start in range(0, 16384, 128))
    same, pairs, seen = 0.0, 0.0, []
    for batch in mixed(blocks, 256, buffer, np.random.default_rng(0)):
        of_block = np.bincount(batch["row"].numpy() // 128)
        same += float((of_block * (of_block - 1)).sum())
        pairs += 256 * 255
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(16384))
    assert 128 / 16384 < same / pairs < most  # 1 where rows are not mixed: half a batch is a block
