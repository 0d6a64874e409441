"""Turn the documents of the corpus into token ids, and plan the shards."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config import thaw
    from theloom.tokens import tokenize

    tokenize(thaw(snakemake.input.config), Path(snakemake.output.tokens))
