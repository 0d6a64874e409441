"""Recompute sampled documents with plain transformers, and check every stored row's hash."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    config = load_frozen(snakemake.input.config)
    with gpu_lease.of_job(snakemake.resources, config.extraction.device):
        from theloom.verification.verify import verify_run

        verify_run(
            config,
            Path(snakemake.input.activations),
            Path(snakemake.input.model),
            Path(snakemake.output.verification),
        )
