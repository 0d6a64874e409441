"""Draw memory by component, foretold against found, and the GPUs with room for the run."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0]):
    from theloom.config import thaw
    from theloom.report import draw_memory

    draw_memory(
        thaw(snakemake.input.config),
        Path(snakemake.input.estimate),
        Path(snakemake.input.model),
        Path(snakemake.output[0]).parent,
    )
