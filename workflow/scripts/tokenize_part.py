"""Turn a share of the corpus into token ids."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.corpus.in_parts.part import tokenize_part

    tokenize_part(
        load_frozen(snakemake.input.config),
        int(snakemake.wildcards.part),
        int(snakemake.wildcards.parts),
        Path(snakemake.output.tokens),
    )
