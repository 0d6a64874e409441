"""Fetch the model, its tokenizer and a hub's data set, so that no later job needs a network."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], online=True):
    from theloom.config.frozen import load_frozen
    from theloom.pipeline.stage_model import stage

    stage(load_frozen(snakemake.input.config), Path(snakemake.output.source))
