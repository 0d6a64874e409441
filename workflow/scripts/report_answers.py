"""Draw how long answers are, why they end, and how fast they were sampled."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_answers

    draw_answers(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.answers),
        [Path(shard) for shard in snakemake.input.sampled],
        Path(snakemake.output[0]).parent,
    )
