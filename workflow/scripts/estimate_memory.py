"""Estimate the memory and the disk of a run from its config alone."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config import thaw
    from theloom.estimate import run_estimate

    run_estimate(thaw(snakemake.input.config), Path(snakemake.output.estimate))
