"""The mean hidden state at each hook point of a run, as an .npz file with an array for each."""

import numpy as np
import theloom


def means(path: str) -> dict[str, np.ndarray]:
    """Compute the mean over all rows, of shape (hidden size,), for each hook point."""
    activations = theloom.open(path)
    return {hook: activations[hook][:].float().mean(dim=0).numpy() for hook in activations.hooks}


if "snakemake" in globals():
    np.savez(snakemake.output.means, **means(snakemake.input.activations))
