"""Put the answers behind their prompts: the documents that are extracted."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.answers.gather import gather
    from theloom.config.frozen import load_frozen

    gather(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.prompts),
        [Path(shard) for shard in snakemake.input.answers],
        Path(snakemake.output.answers),
    )
