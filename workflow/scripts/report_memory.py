"""Draw memory by component, predicted against measured, and the GPUs with room for the run."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_memory

    draw_memory(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.estimate),
        Path(snakemake.input.model),
        Path(snakemake.output[0]).parent,
    )
