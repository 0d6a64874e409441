"""Extract the hidden states of one shard of documents."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom import lease
    from theloom.config import thaw

    device = thaw(snakemake.input.config).extraction.device
    with lease.of_job(snakemake.resources, device):
        from theloom.engine import extract_shard

        extract_shard(
            config_path=Path(snakemake.input.config),
            estimate_path=Path(snakemake.input.estimate),
            model_path=Path(snakemake.input.model),
            tokens_path=Path(snakemake.input.tokens),
            shard=int(snakemake.wildcards.shard),
            output=Path(snakemake.output.shard),
            oom_level=snakemake.resources.get("oom_level", 0),
        )
