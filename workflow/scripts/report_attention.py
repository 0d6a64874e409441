"""Draw attention patterns of one document."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0]):
    from theloom.config import thaw
    from theloom.report import draw_attention

    draw_attention(
        thaw(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.output[0]).parent,
    )
