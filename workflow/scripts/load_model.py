"""Load the model once: precision, fingerprint, hook points, and its memory, predicted against measured."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom import lease
    from theloom.config import thaw

    config = thaw(snakemake.input.config)
    with lease.of_job(snakemake.resources, config.extraction.device):
        from theloom.model_record import record

        record(
            config,
            Path(snakemake.input.estimate),
            Path(snakemake.input.tokens),
            Path(snakemake.output.model),
        )
