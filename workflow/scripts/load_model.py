"""Load the model once: precision, fingerprint, hook points, and its memory, predicted against
measured.
"""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    config = load_frozen(snakemake.input.config)
    with gpu_lease.of_job(snakemake.resources, config.extraction.device):
        from theloom.pipeline.load_model import record

        record(
            config,
            Path(snakemake.input.estimate),
            Path(snakemake.input.tokens),
            Path(snakemake.output.model),
        )
