"""Extract the hidden states of one shard of documents."""

from pathlib import Path

from theloom.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom import lease
    from theloom.config import thaw

    asked = snakemake.resources
    device = thaw(snakemake.input.config).extraction.device
    with lease.gpus(asked.get("gpu", 0), 10**6 * asked.get("needed_gpu_mb", 0), device):
        from theloom.engine import extract_shard

        extract_shard(
            config_path=Path(snakemake.input.config),
            estimate_path=Path(snakemake.input.estimate),
            model_path=Path(snakemake.input.model),
            tokens_path=Path(snakemake.input.tokens),
            shard=int(snakemake.wildcards.shard),
            output=Path(snakemake.output.shard),
            oom_level=asked.get("oom_level", 0),
        )
