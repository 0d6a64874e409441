"""Merge the shards into one dataset."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0]):
    from theloom.config import thaw
    from theloom.merge import merge

    mode = thaw(snakemake.input.config).store.merge.name
    merge([Path(shard) for shard in snakemake.input.shards], mode, Path(snakemake.output.activations))
