"""Recompute sampled documents with plain transformers, and check every stored row's hash."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom import lease
    from theloom.config import thaw

    config = thaw(snakemake.input.config)
    with lease.of_job(snakemake.resources, config.extraction.device):
        from theloom.verify import verify

        verify(
            config,
            Path(snakemake.input.activations),
            Path(snakemake.input.model),
            Path(snakemake.output.verification),
        )
