"""Load the model once: precision, fingerprint, hook points, and its memory, predicted against measured."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom import lease
    from theloom.config import thaw

    asked = snakemake.resources
    config = thaw(snakemake.input.config)
    with lease.gpus(asked.get("gpu", 0), 10**6 * asked.get("needed_gpu_mb", 0), config.extraction.device):
        from theloom.model_record import record

        record(
            config,
            Path(snakemake.input.estimate),
            Path(snakemake.input.tokens),
            Path(snakemake.output.model),
        )
