"""Draw tokens a second, padding, and where the time went, shard by shard."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0]):
    from theloom.config import thaw
    from theloom.report import draw_speed

    draw_speed(
        thaw(snakemake.input.config),
        [Path(shard) for shard in snakemake.input.shards],
        Path(snakemake.output[0]).parent,
    )
