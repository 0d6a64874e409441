"""Recompute sampled documents with plain transformers, and check every stored row's hash."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config import thaw
    from theloom.verify import verify

    verify(
        thaw(snakemake.input.config),
        Path(snakemake.input.activations),
        Path(snakemake.input.model),
        Path(snakemake.output.verification),
    )
