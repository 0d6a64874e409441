"""Check the files and the hash of every stored row of a group of shards."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.verification.in_parts import check_rows

    check_rows(
        Path(snakemake.input.activations),
        int(snakemake.wildcards.part),
        int(snakemake.wildcards.parts),
        Path(snakemake.output.counts),
        snakemake.threads,
    )
