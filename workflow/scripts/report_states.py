"""Draw norms, massive activations, similarity of layers, and the map of one layer."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_states

    draw_states(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.output[0]).parent,
    )
