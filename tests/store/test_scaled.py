"""Rows of one byte an element: the codes against torch and a search over all of them; values that
are not finite; what the writer makes of them.
"""

import h5py
import numpy as np
import pytest
import torch
import xxhash
from shards import LENGTHS, POINTS, spec
from theloom.errors import StoreError
from theloom.precision import row_bytes
from theloom.store.encoding import scaled
from theloom.store.writer import ShardWriter

TYPES = ["fp8_e4m3", "int8"]
HOOK = f"hooks/{POINTS[0].name}/activations"
DTYPE = {"fp8_e4m3": "u1", "int8": "i1"}


def numbers(precision: str) -> np.ndarray:
    """What all 256 codes are, by torch and by NumPy; NaN for those that are no number."""
    if precision == "int8":
        return np.arange(256).astype("u1").view("i1").astype("f8")
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).double().numpy()


def nearest(quotients: np.ndarray, precision: str) -> np.ndarray:
    """The codes nearest to quotients, of two equally near ones the even, by a look at all codes."""
    values = numbers(precision)
    codes = np.array([c for c in range(256) if np.isfinite(values[c]) and c != 0x80], "u1")
    distance = np.abs(quotients[..., None] - values[codes])
    closest = distance == distance.min(axis=-1, keepdims=True)
    # of equally near codes the even one
    return codes[(closest * (2 - codes % 2)).argmax(axis=-1)]


def recipe(codes: np.ndarray, scales: np.ndarray, precision: str) -> np.ndarray:
    """The page's formula, in NumPy's and torch's own words."""
    values = numbers(precision)[codes.view("u1")] * np.abs(scales.astype("f8"))[:, None]
    values = values.astype("f4")
    marked = (scales < 0)[:, None]
    largest, negative = (127, -127) if precision == "int8" else (126, 254)
    values[marked & (codes == largest)] = np.inf
    values[marked & (codes == negative)] = -np.inf
    if precision == "int8":
        values[marked & (codes == -128)] = np.nan
    return values


@pytest.mark.parametrize("precision", TYPES)
def test_every_code_is_the_number_that_torch_and_numpy_say(precision):
    codes = np.arange(256).astype("u1").view(DTYPE[precision])[None]
    for scale in (1.0, 0.3, 2.0**-140):
        decoded = scaled.decode(codes, np.array([scale], "<f4"), precision)
        expected = (numbers(precision) * np.float32(scale)).astype("f4")
        assert np.array_equal(decoded[0], expected, equal_nan=True)
        negative = np.array([-scale], "<f4")
        decoded = scaled.decode(codes, negative, precision)
        assert np.array_equal(decoded, recipe(codes, negative, precision), equal_nan=True)


@pytest.mark.parametrize("precision", TYPES)
def test_a_number_of_a_code_is_encoded_as_this_code(precision):
    values = numbers(precision)
    own = np.array([c for c in range(256) if abs(values[c]) <= scaled.SCALED[precision]])
    rows = torch.from_numpy(values[own].astype("f4"))[None]
    codes, scales = scaled.encode(rows, precision)
    assert scales.tolist() == [1.0]
    if precision == "int8":
        assert np.array_equal(codes[0].view("u1"), own)
    else:  # -0.0 stays itself
        assert np.array_equal(codes[0], own)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-20, 1.0, 3e4, 1e30, 3.4028234e38])
def test_codes_are_the_nearest_and_nothing_overflows(precision, size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 33, generator=generator)
    rows *= torch.logspace(-6, 0, 33)  # of all sizes in a row, subnormal codes too
    rows = (rows / rows.abs().amax(1, keepdim=True)).double().mul(size).float()
    codes, scales = scaled.encode(rows, precision)
    assert (scales > 0).all()
    quotients = rows.numpy() / scales[:, None]
    largest = scaled.SCALED[precision]
    expected = nearest(np.clip(quotients, -largest, largest).astype("f8"), precision)
    values = numbers(precision)
    assert np.array_equal(values[codes.view("u1")], values[expected])
    decoded = scaled.decode(codes, scales, precision)
    assert np.isfinite(decoded).all()
    error = np.abs(decoded.astype("f8") - rows.double().numpy())
    assert (error <= scaled.rounding(codes, scales, precision)).all()
    if size >= 1e-38:
        assert np.abs(codes.view("u1") & 0x7F if precision == "fp8_e4m3" else codes).max() >= 126
        if precision == "int8":
            most = np.abs(rows.numpy()).max(axis=1, keepdims=True).astype("f8")
            assert (error <= most / 253.9).all()


@pytest.mark.parametrize("precision", TYPES)
def test_ties_go_to_the_even_code(precision):
    half = [448.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10]
    rows = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5] if precision == "int8" else half
    codes, scales = scaled.encode(torch.tensor([rows]), precision)
    assert scales.tolist() == [1.0]
    values = numbers(precision)[codes[0].view("u1")].tolist()
    even = [127, 0, 2, 2, 0, -2] if precision == "int8" else [448, 1.0, 1.25, 0.0, 2.0**-8]
    assert values == even


@pytest.mark.parametrize("precision", TYPES)
def test_rows_of_zeros_one_token_and_no_rows(precision):
    rows = torch.tensor([[0.0, 0.0], [0.0, -3.0]])
    assert scaled.round_trip(rows, precision).tolist() == rows.tolist()
    assert scaled.round_trip(rows[:1], precision).tolist() == [[0.0, 0.0]]
    codes, scales = scaled.encode(rows[:0], precision)
    assert (codes.shape, scales.shape) == ((0, 2), (0,))
    assert scaled.round_trip(torch.zeros(3, 4, 5), precision).shape == (3, 4, 5)


@pytest.mark.parametrize("precision", TYPES)
def test_values_that_are_not_finite_stay_where_they_are(precision):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 40, generator=generator)
    rows[1, 3], rows[1, 39], rows[2, 0], rows[2, 1] = np.inf, -np.inf, np.nan, -np.inf
    rows[4] = np.nan
    rows[5], rows[5, 7] = 0.0, np.inf
    codes, scales = scaled.encode(rows, precision)
    assert (scales < 0).tolist() == [False, True, True, False, True, True]
    decoded = scaled.decode(codes, scales, precision)
    assert np.array_equal(decoded, recipe(codes, scales, precision), equal_nan=True)
    truth = rows.numpy()
    wrong = ~np.isfinite(truth)
    assert np.array_equal(decoded[wrong], truth[wrong], equal_nan=True)
    assert np.isfinite(decoded[~wrong]).all()
    error = np.abs(np.where(wrong, 0, decoded - np.where(wrong, 0, truth)))
    assert (error <= scaled.rounding(codes, scales, precision)).all()
    assert (decoded[5, np.arange(40) != 7] == 0).all()
    alone = scaled.round_trip(rows[[0, 3]], precision).numpy()
    assert np.array_equal(decoded[[0, 3]], alone), "other rows are as without them"


@pytest.mark.parametrize("precision", TYPES)
def test_sixteen_bits_are_encoded_as_the_same_fp32_numbers(precision):
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.bfloat16, torch.float16):
        low = rows.to(dtype)
        for one, other in zip(
            scaled.encode(low, precision), scaled.encode(low.float(), precision), strict=True
        ):
            assert np.array_equal(one, other)


def write(path, precision, chunks, rows, **others) -> None:
    """A shard of all windows, each in chunks of so many rows."""
    with ShardWriter(path, spec(precision, **others)) as writer:
        first = 0
        for window, length in enumerate(LENGTHS):
            for point in POINTS:
                for start in range(0, length, chunks):
                    stop = min(start + chunks, length)
                    writer.write(window, point.name, start, rows[first + start : first + stop])
            first += length
            writer.batch_done(first, last=window == len(LENGTHS) - 1)
        writer.finish()


@pytest.mark.parametrize("precision", TYPES)
def test_a_shard_has_codes_scales_and_the_page_s_hash_in_any_chunks(tmp_path, precision):
    rows = torch.randn(9, 8, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for chunks in (1, 2, 5):
        write(tmp_path / f"{chunks}.h5", precision, chunks, rows)
    codes, scales = scaled.encode(rows, precision)
    for chunks in (1, 2, 5):
        with h5py.File(tmp_path / f"{chunks}.h5") as file:
            stored, sizes = file[HOOK], file[f"{HOOK}_scale"]
            assert (stored.dtype, sizes.dtype) == (DTYPE[precision], np.dtype("<f4"))
            assert np.array_equal(stored[:], codes)
            assert np.array_equal(sizes[:], scales)
            assert dict(stored.attrs) | {"value": ""} == {
                "encoding": precision,
                "scale": "activations_scale",
                "value": "",
            }
            first = np.cumsum([0, *LENGTHS])
            for window, begin in enumerate(first[:-1]):
                part = slice(begin, begin + LENGTHS[window])
                data = codes[part].tobytes() + scales[part].tobytes()
                assert file["windows/hash"][window, 0] == xxhash.xxh3_64_intdigest(data)
            size = stored.id.get_storage_size() + sizes.id.get_storage_size()
            assert size == 9 * row_bytes(precision, 8) == 9 * (8 + 4)
            decoded = scaled.decode(codes, scales, precision).astype("f8")
            assert file["statistics/mean"][:8] == pytest.approx(decoded.mean(axis=0), rel=1e-5)


@pytest.mark.parametrize("precision", TYPES)
def test_values_that_are_not_finite_end_the_job_or_are_kept(tmp_path, precision):
    rows = torch.ones(9, 8)
    rows[4, 2], rows[4, 3] = np.inf, np.nan
    with pytest.raises(StoreError, match=r"is not finite: inf at token 0 of d2"):
        write(tmp_path / "refused.h5", precision, 2, rows)
    write(tmp_path / "kept.h5", precision, 2, rows, allow_nonfinite=True)
    with h5py.File(tmp_path / "kept.h5") as file:
        assert file["statistics/nonfinite"][:].tolist() == [2, 2]
        assert file["statistics/infinite"][:].tolist() == [1, 1]
