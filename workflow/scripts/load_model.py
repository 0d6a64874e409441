"""Load the model once: precision, fingerprint, hook points, and its memory, predicted against measured."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config import thaw
    from theloom.model_record import record

    record(
        thaw(snakemake.input.config),
        Path(snakemake.input.estimate),
        Path(snakemake.input.tokens),
        Path(snakemake.output.model),
    )
