"""Push a finished shard to the run's remote store."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], online=True):
    from theloom.config.frozen import load_frozen
    from theloom.pipeline.push import push_shard

    push_shard(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.shard),
        snakemake.wildcards.run,
        Path(snakemake.output.record),
    )
