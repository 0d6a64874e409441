"""Recompute sampled documents with plain transformers, and check every stored row's hash; or gather
what the jobs of parts found.
"""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    config = load_frozen(snakemake.input.config)
    activations, model = Path(snakemake.input.activations), Path(snakemake.input.model)
    output = Path(snakemake.output.verification)
    if snakemake.input.rows:
        from theloom.verification.in_parts import gather

        rows, documents = (
            [Path(part) for part in parts]
            for parts in (snakemake.input.rows, snakemake.input.documents)
        )
        gather(activations, model, rows, documents, output)
    else:
        with gpu_lease.of_job(snakemake.resources, config.extraction.device):
            from theloom.verification.verify import verify_run

            verify_run(config, activations, model, output, snakemake.threads)
