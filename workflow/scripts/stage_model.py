"""Fetch the model, its tokenizer and a hub's data set, so that no later job needs a network."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], online=True):
    from theloom.config import thaw
    from theloom.staging import stage

    stage(thaw(snakemake.input.config), Path(snakemake.output.source))
