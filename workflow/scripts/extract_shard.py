"""Extract the hidden states of one shard of documents, or of several with one model."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    device = load_frozen(snakemake.input.config).extraction.device
    with gpu_lease.of_job(snakemake.resources, device):
        from theloom.pipeline.extract_shard import extract_shards

        extract_shards(
            config_path=Path(snakemake.input.config),
            estimate_path=Path(snakemake.input.estimate),
            model_path=Path(snakemake.input.model),
            tokens_path=Path(snakemake.input.tokens),
            outputs={int(Path(file).name.split("-")[0]): Path(file) for file in snakemake.output},
            oom_level=snakemake.resources.get("oom_level", 0),
        )
