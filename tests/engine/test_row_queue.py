"""Rows in memory follow the file's rule for values that are not finite."""

import pytest
import torch
from shards import POINTS, spec
from theloom.engine.row_queue import RowQueue, ShardRows
from theloom.errors import StoreError


def taken(value, **settings):
    """What a consumer gets of a batch of one window, three rows with a value in the last."""
    queue = RowQueue()
    rows = torch.zeros(3, 8, dtype=torch.float16 if settings.get("precision") else None)
    rows[2, 1] = value
    with ShardRows(queue, spec(**settings)) as sink:
        for point in POINTS:
            sink.write(0, point.name, 0, rows)
        sink.batch_done(3)
    return queue.get().hooks[POINTS[0].name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_ends_the_job_with_its_token(value):
    with pytest.raises(StoreError, match=r"is not finite: (nan|inf) at token 2 of d0; .*weights"):
        taken(value)
    assert not taken(value, allow_nonfinite=True).isfinite().all()
    assert taken(1.0).isfinite().all()


def test_a_share_of_values_may_be_beyond_half_precision():
    overflow = {"precision": "fp16", "max_overflow": 0.02}
    assert taken(float("inf"), **overflow).isinf().sum() == 1
    with pytest.raises(StoreError, match=r"1 of 72 values of .* are beyond fp16's 65,504"):
        taken(float("inf"), **overflow | {"max_overflow": 0.01})
    with pytest.raises(StoreError, match="is not finite: nan"):
        taken(float("nan"), **overflow)
