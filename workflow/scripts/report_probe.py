"""Draw the accuracy of a linear probe of the label by hook point."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_probe

    draw_probe(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.output[0]).parent,
    )
