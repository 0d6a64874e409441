"""Draw norms, massive activations, likeness of layers, and the map of one layer."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0]):
    from theloom.config import thaw
    from theloom.report import draw_states

    draw_states(
        thaw(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.output[0]).parent,
    )
