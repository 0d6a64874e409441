"""Turn the documents of the corpus into token ids, and plan the shards."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.corpus.tokens import tokenize

    tokenize(load_frozen(snakemake.input.config), Path(snakemake.output.tokens))
