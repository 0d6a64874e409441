"""Draw tokens a second, padding, and where the time went, shard by shard."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.draw import draw_speed

    draw_speed(
        load_frozen(snakemake.input.config),
        [Path(shard) for shard in snakemake.input.shards],
        Path(snakemake.output[0]).parent,
    )
