"""Statistics against NumPy in float64, where numerics are hard, and counts of nonfinite values."""

import numpy as np
import pytest
import torch
from theloom.precision import precision_of, torch_dtype
from theloom.store import statistics
from theloom.store.hdf5 import element_types


def rows(count: int, precision: str = "fp32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 40, generator=generator)
    values[:, 0] += 3000  # a massive activation: its spread is a hundred-thousandth of its square
    values[:, 1] *= 1e-3
    return values.to(torch_dtype(precision))


def of(values: torch.Tensor, hook: str = "x", pieces: int = 1) -> statistics.Statistics:
    found = statistics.empty_statistics(hook, values.shape[1])
    for piece in np.array_split(element_types.bits(values), pieces):
        found.add(piece, precision_of(values.dtype))
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_mean_variance_and_norm_are_numpy_s(precision):
    values = rows(5000, precision)
    found, truth = of(values), values.double().numpy()
    assert found.rows == 5000
    np.testing.assert_allclose(found.mean, truth.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.variance, truth.var(axis=0), rtol=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(truth, axis=1).mean(), rel=1e-6)
    assert found.mean_of_all == pytest.approx(truth.mean(), rel=1e-6)
    assert found.variance_of_all == pytest.approx(truth.var(), rel=1e-5)
    assert found.nonfinite == found.infinite == 0


@pytest.mark.parametrize("first", [1, 3, 900, 2000])
def test_rows_whose_mean_moves_lose_no_digits(first):
    """Sorted documents: steps far larger than the spread, a few rows at first and many afterwards,
    and a slow drift.
    """
    values = rows(5000)
    values[:, 2] = (torch.arange(5000) >= first) * 1e4
    values[:, 3] += torch.arange(5000) * 10.0
    values[:, 4] = -7.25
    found, truth = of(values, pieces=7), values.double().numpy()
    np.testing.assert_allclose(found.mean, truth.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.variance, truth.var(axis=0), rtol=1e-5)


def test_rows_are_left_as_they_are():
    values = rows(3000)
    before = values.clone()
    of(values, pieces=2)
    assert torch.equal(values, before)


def test_parts_put_together_are_the_whole():
    values = rows(3001)
    parts = [of(part) for part in values.split([1, 1000, 2000])]
    total = statistics.empty_statistics("x", 40)
    for part in parts:
        total.join(part)
    whole = of(values)
    assert total.rows == whole.rows == 3001
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(total.variance, whole.variance, rtol=1e-5)


def test_what_is_not_finite_is_counted_and_left_out():
    values = rows(1000)
    values[3, 0], values[7, 0], values[9, 5] = torch.inf, torch.nan, -torch.inf
    found = of(values)
    assert (found.nonfinite, found.infinite) == (3, 2)
    kept = np.delete(values[:, 0].double().numpy(), [3, 7])
    assert found.count[0] == 998
    assert found.mean[0] == pytest.approx(kept.mean(), rel=1e-9)
    assert found.variance[0] == pytest.approx(kept.var(), rel=1e-5)


def test_scores_of_masked_keys_are_no_mistake():
    values = rows(100)
    values[:, 5:] = -torch.inf
    values[0, 0] = torch.inf
    assert of(values, "blocks.0.attn.hook_attn_scores").nonfinite == 1
    assert of(values).nonfinite == 3501


def test_values_whose_squares_are_beyond_float32_are_finite():
    found = of(torch.full((10, 4), 1e30))
    assert found.nonfinite == 0
    assert found.norm == pytest.approx(2e30, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_whose_sums_of_squares_are_beyond_float32_are_right(precision):
    """Each row's m2 can be summed in float32, those of a column, or of deviations twice as
    large, cannot.
    """
    values = torch.full((6000, 4), 8e18)
    values[::3] = -8e18
    found, truth = (
        of(values.to(torch_dtype(precision)), pieces=3),
        values.to(torch_dtype(precision)).double().numpy(),
    )
    assert found.nonfinite == 0
    np.testing.assert_allclose(found.mean, truth.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.variance, truth.var(axis=0), rtol=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(truth, axis=1).mean(), rel=1e-6)
