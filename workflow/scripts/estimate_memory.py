"""Estimate the memory and the disk of a run from its config alone."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.planning.estimate import run_estimate

    run_estimate(load_frozen(snakemake.input.config), Path(snakemake.output.estimate))
