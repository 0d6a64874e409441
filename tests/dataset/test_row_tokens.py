"""The table of stored rows is checked against kept tokens piece by piece, as it would be whole."""

import numpy as np
import pytest
from theloom.dataset.tables import read_row_tokens
from theloom.store.tables.tokens import ROW_TOKEN


def fits(found: np.ndarray, kept: np.ndarray, rows: int, tokens: int, pooled: bool) -> bool:
    """What is required, in terms of whole tables."""
    if found.shape != (rows,) or kept.shape != (tokens,) or (np.diff(found) <= 0).any():
        return False
    if rows and not 0 <= found[0] <= found[-1] < tokens:
        return False
    of_rows = {*found.tolist()}
    of_tokens = {*np.flatnonzero(kept).tolist()}
    if pooled:  # a row's token is the last of those that it is made of
        return of_rows <= of_tokens and max(of_tokens, default=-1) == max(of_rows, default=-1)
    return of_rows == of_tokens


@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize("together", [1, 3, 100])
def test_stored_rows_fit_kept_tokens_or_are_refused(pool, together):
    seen = {True: 0, False: 0}
    for seed in range(300):
        chance = np.random.default_rng(seed)
        tokens = int(chance.integers(0, 12))
        kept = (chance.random(tokens) < chance.choice([0, 0.4, 1])).astype("u1")
        found = np.flatnonzero(kept).astype("<i8")
        if pool != "none" and len(found):
            found = found[np.append(chance.random(len(found) - 1) < 0.5, True)]
        damage = chance.integers(0, 6)
        if damage == 1 and len(found):
            found[chance.integers(len(found))] += chance.choice([-1, 1, 40])
        elif damage == 2 and tokens:
            kept[chance.integers(tokens)] ^= 1
        elif damage == 3 and len(found):
            found = found[:-1]
        elif damage == 4:
            kept = np.append(kept, np.uint8(chance.integers(2)))
        attributes = {"rows": len(found), "tokens": tokens, "rows_pool": pool}
        expected = fits(found, kept, len(found), tokens, pool == "mean")
        seen[expected] += 1
        pieces = [kept[n : n + together] for n in range(0, len(kept), together)]
        array, given = {ROW_TOKEN: found}.__getitem__, {"tokens/kept": pieces}
        if expected:
            assert read_row_tokens(array, lambda n, of=given: iter(of[n]), attributes) is found
        else:
            with pytest.raises(ValueError, match="its"):
                read_row_tokens(array, lambda n, of=given: iter(of[n]), attributes)
    assert min(seen.values()) > 50
