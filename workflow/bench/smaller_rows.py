"""What a precision of the store costs, measured on the rows of a finished run that has FP32 rows.

    make run SET="name=rows memory.precision_mode=fp32"
    .venv/bin/python workflow/bench/smaller_rows.py results/rows

The rows are rounded in memory to what a run with each `store.dtype` gives of them, bit for bit
(`tests/dataset/test_scaled_rows.py` shows that). For each hook point: the relative error of a row
and its cosine similarity, over all rows; the accuracy of the example's linear probe; and at the
middle hook point the variance that the example's sparse autoencoder leaves unexplained. Probe and
autoencoder are trained on the rounded rows, and tested on held-out rows in FP32. The autoencoder
takes a minute or more for each precision; `--no-sae` leaves it out.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import theloom
import torch
from theloom.dataset.activations import Activations
from theloom.dataset.batches import Batch
from theloom.precision import SCALED, row_bytes, torch_dtype
from theloom.store.encoding import scaled
from theloom.verification.encoding import Cost, cost

sys.path.insert(0, str(Path(__file__).parents[1] / "docs/examples"))

import probe
import sparse_autoencoder

_PRECISIONS = ("fp32", "bf16", *SCALED)
_COLUMNS = (
    *("hook point", "`store.dtype`", "bytes of a row", "relative error", "at most"),
    *("1 - cosine", "at most", "probe", "variance unexplained"),
)


class Rounded:
    """A dataset whose rows are rounded to a precision of the store when they are read."""

    def __init__(self, acts: Activations, stored_as: str) -> None:
        self._acts, self.stored_as = acts, stored_as
        self.position = acts.position

    def __len__(self) -> int:
        return len(self._acts)

    def __getitem__(self, hook: str) -> "_Rows":
        return _Rows(self, hook)

    def read(self, hook: str, rows: Any) -> torch.Tensor:
        """The rows of a hook point."""
        return self.rounded(self._acts[hook][rows])

    def rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """What is read of rows that are stored, (rows, ...) FP32."""
        if self.stored_as in SCALED:
            return scaled.round_trip(rows, self.stored_as)
        return rows.to(torch_dtype(self.stored_as)).float()

    def batches(self, hooks: list[str], batch_size: int, **others: Any) -> Iterator[Batch]:
        """Batches of `Activations.batches`, rounded."""
        for batch in self._acts.batches(hooks, batch_size, **others):
            yield {
                name: self.rounded(values) if name in self._acts.hooks else values
                for name, values in batch.items()
            }


class _Rows:
    def __init__(self, of: Rounded, hook: str) -> None:
        self._of, self._hook = of, hook

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self._of.read(self._hook, rows)


def accuracy(acts: Rounded, hook: str, truth: Activations) -> float:
    """The accuracy of a probe that is trained on rounded rows and tested on FP32 ones."""
    labels, train, test = probe.labelled(truth)
    states, held_out = acts[hook][train], truth[hook][test].float()
    mean, scale = states.mean(dim=0), states.std(dim=0) + 1e-6
    of_row = torch.from_numpy(labels).float()
    fitted = probe.fit((states - mean) / scale, of_row[train])
    return probe.accuracy(fitted, (held_out - mean) / scale, of_row[test])


def over_all(acts: Rounded, hook: str, truth: Activations) -> Cost:
    """The cost over all rows, read in parts."""
    step = 4096
    parts = [slice(start, min(start + step, len(acts))) for start in range(0, len(acts), step)]
    found = np.array([cost(acts[hook][part], truth[hook][part].float()) for part in parts])
    shares = np.array([(part.stop - part.start) / len(acts) for part in parts])
    means = shares @ found
    return Cost(means[0], found[:, 1].max(), means[2], found[:, 3].min())


def main(run: Path, autoencoder: bool = True) -> list[tuple[str, ...]]:
    """Print a table in Markdown; returns its rows."""
    truth = theloom.open(run / "activations.h5")
    if truth.stored_as != "fp32":
        raise SystemExit(f"{run} stores {truth.stored_as}; give a run that stores fp32")
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for line in lines:
        print(f"| {' | '.join(line)} |")
    for hook in truth.hooks:
        for stored_as in _PRECISIONS:
            acts = Rounded(truth, stored_as)
            found, left = over_all(acts, hook, truth), ""
            if autoencoder and hook == truth.hooks[len(truth.hooks) // 2]:
                left = f"{sparse_autoencoder.train(acts, hook, truth)[1]:.4f}"
            size = row_bytes(stored_as, truth[hook][:1].numel())
            lines.append(
                (
                    *(hook, stored_as, f"{size:,}"),
                    *(f"{found.error:.2e}", f"{found.max_error:.2e}"),
                    *(f"{1 - found.cosine:.1e}", f"{1 - found.min_cosine:.1e}"),
                    *(f"{accuracy(acts, hook, truth):.4f}", left),
                )
            )
            print(f"| {' | '.join(lines[-1])} |", flush=True)
    return lines[2:]


if __name__ == "__main__":
    words = sys.argv[1:]
    main(*[Path(word) for word in words if word != "--no-sae"], "--no-sae" not in words)
