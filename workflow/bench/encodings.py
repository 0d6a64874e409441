"""What a precision of the store costs, measured on finished runs against the one stored in FP32.

    make run SET="name=rows memory.precision_mode=fp32 store.dtype=fp32,bf16,fp8_e4m3,int8"
    .venv/bin/python workflow/bench/encodings.py results/rows+*

For each run and hook point: the relative error of a row and its cosine similarity, over all rows;
the accuracy of the example's linear probe; and at the middle hook point the variance that the
example's sparse autoencoder leaves unexplained. Probe and autoencoder are trained on the run's
rows, and tested on held-out rows in FP32. The autoencoder takes a minute or more for each run;
`--no-sae` leaves it out.
"""

import sys
from pathlib import Path

import theloom
import torch
from theloom.dataset.activations import Activations
from theloom.verification.encoding import Cost, cost

sys.path.insert(0, str(Path(__file__).parents[1] / "docs/examples"))

import probe
import sparse_autoencoder

_COLUMNS = (
    *("hook point", "stored as", "bytes of a row", "relative error", "at most"),
    *("1 − cosine", "at most", "probe", "variance unexplained"),
)


def accuracy(acts: Activations, hook: str, truth: Activations) -> float:
    """The accuracy of a probe that is trained on rows of one run and tested on those of another."""
    labels, train, test = probe.labelled(truth)
    states, held_out = acts[hook][train].float(), truth[hook][test].float()
    mean, scale = states.mean(dim=0), states.std(dim=0) + 1e-6
    of_row = torch.from_numpy(labels).float()
    fitted = probe.fit((states - mean) / scale, of_row[train])
    return probe.accuracy(fitted, (held_out - mean) / scale, of_row[test])


def over_all(acts: Activations, hook: str, truth: Activations) -> Cost:
    """The cost over all rows, read in parts."""
    step = 4096
    parts = [slice(start, start + step) for start in range(0, len(acts), step)]
    found = [cost(acts[hook][part].float(), truth[hook][part].float()) for part in parts]
    shares = [len(range(len(acts))[part]) / len(acts) for part in parts]
    return Cost(
        sum(s * f.error for s, f in zip(shares, found, strict=True)),
        max(f.max_error for f in found),
        sum(s * f.cosine for s, f in zip(shares, found, strict=True)),
        min(f.min_cosine for f in found),
    )


def main(folders: list[Path], autoencoder: bool = True) -> list[tuple[str, ...]]:
    """Print a table in Markdown; returns its rows."""
    runs = [theloom.open(folder / "activations.h5") for folder in folders]
    truth = next((acts for acts in runs if acts.stored_as == "fp32"), None)
    if truth is None:
        raise SystemExit("encodings: none of the runs has store.dtype=fp32; name one that has")
    lines = []
    for hook in truth.hooks:
        for acts in runs:
            found = over_all(acts, hook, truth)
            left = ""
            if autoencoder and hook == truth.hooks[len(truth.hooks) // 2]:
                left = f"{sparse_autoencoder.train(acts, hook, truth)[1]:.4f}"
            lines.append(
                (
                    *(hook, acts.stored_as, f"{acts[hook].nbytes // len(acts):,}"),
                    *(f"{found.error:.2e}", f"{found.max_error:.2e}"),
                    *(f"{1 - found.cosine:.1e}", f"{1 - found.min_cosine:.1e}"),
                    *(f"{accuracy(acts, hook, truth):.4f}", left),
                )
            )
    for line in (_COLUMNS, ("---",) * len(_COLUMNS), *lines):
        print(f"| {' | '.join(line)} |")
    return lines


if __name__ == "__main__":
    words = sys.argv[1:]
    main([Path(word) for word in words if word != "--no-sae"], "--no-sae" not in words)
