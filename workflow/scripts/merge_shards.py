"""Merge the shards into one dataset."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.dataset.merge import merge_shards

    mode = load_frozen(snakemake.input.config).store.merge.name
    merge_shards(
        [Path(shard) for shard in snakemake.input.shards], mode, Path(snakemake.output.activations)
    )
