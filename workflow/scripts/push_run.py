"""Push what is left of a verified run to its remote store, and the manifest, which opens it."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], online=True):
    from theloom.config.frozen import load_frozen
    from theloom.pipeline.push import push_run

    push_run(
        load_frozen(snakemake.input.config),
        Path(snakemake.input.activations),
        snakemake.wildcards.run,
        Path(snakemake.output.record),
    )
