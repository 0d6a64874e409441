"""Recompute a share of the sampled documents with plain transformers."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    config = load_frozen(snakemake.input.config)
    with gpu_lease.of_job(snakemake.resources, config.extraction.device):
        from theloom.verification.in_parts import recompute_documents

        recompute_documents(
            config,
            Path(snakemake.input.activations),
            Path(snakemake.input.model),
            int(snakemake.wildcards.part),
            int(snakemake.wildcards.parts),
            Path(snakemake.output.errors),
        )
