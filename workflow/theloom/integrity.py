"""Whether a finished dataset is, bit for bit, what was written: every window's hash, every file's seals and log."""

import h5py
import numpy as np
import xxhash

from theloom import commit, directory, layout, seals
from theloom.dataset import Activations
from theloom.errors import StoreError
from theloom.hooks import SCORES

_ROWS_AT_ONCE = 1 << 14


def check_hashes(acts: Activations) -> tuple[list[int], np.ndarray]:
    """Windows whose rows are not those that were written, and for each hook point how many values are not finite."""
    import torch

    wrong: list[int] = []
    not_finite = np.zeros(len(acts.hooks), "<i8")
    readers = [acts[h] for h in acts.hooks]
    masked = [h.endswith(SCORES) for h in acts.hooks]  # scores of masked keys are -inf
    for window in range(len(acts.window_document)):
        begin, end = (int(r) for r in acts.window_offset[window : window + 2])
        for number, reader in enumerate(readers):
            state = xxhash.xxh3_64()
            try:
                for start in range(begin, end, _ROWS_AT_ONCE):
                    rows = reader[start : min(start + _ROWS_AT_ONCE, end)]
                    state.update(layout.raw_bytes(rows))
                    not_finite[number] += int((~torch.isfinite(rows) & ~(masked[number] & rows.isneginf())).sum())
            except StoreError:  # a packed chunk that cannot be unpacked
                state.reset()
            if state.intdigest() != acts.window_hash[window, number]:
                wrong.append(window)
                break
    return wrong, not_finite


def damaged_parts(acts: Activations) -> list[str]:
    """What beside the rows is not as it was written, in words: metadata, tables, logs, of the file and its shards."""
    found = []
    for path in dict.fromkeys([acts.path, *acts.files]):
        try:
            with h5py.File(path, "r") as file, path.open("rb") as f:
                listed = directory.read(file)
                broken = seals.broken(f.fileno(), listed, seals.METADATA, seals.TABLES, seals.RESULTS)
                if listed != directory.derive(file):
                    broken.append("its directory")
                if "commit_log" in file and (records := commit.broken_records(file)):
                    broken.append(f"{len(records)} records of its log (first: batch {records[0]})")
        except layout.DAMAGE as error:
            broken = [f"its metadata ({' '.join(str(error).split())})"]
        if broken:
            found.append(f"{path.name}: {', '.join(broken)}")
    return found
