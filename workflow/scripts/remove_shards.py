"""Read the pushed shards of a run back, and remove the local ones."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], online=True):
    from theloom.config.frozen import load_frozen
    from theloom.pipeline.push import remove_shards

    remove_shards(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.pushed),
        Path(snakemake.output.record),
    )
