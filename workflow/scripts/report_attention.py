"""Draw attention patterns of one document."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_attention

    draw_attention(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.output[0]).parent,
    )
