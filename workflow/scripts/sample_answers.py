"""Have the run's model answer the documents of one shard."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen
    from theloom.devices import gpu_lease

    device = load_frozen(snakemake.input.config).extraction.device
    with gpu_lease.of_job(snakemake.resources, device):
        from theloom.answers.shard import sample_answers

        sample_answers(
            config_path=Path(snakemake.input.config),
            estimate_path=Path(snakemake.input.estimate),
            prompts_path=Path(snakemake.input.prompts),
            shard=int(snakemake.wildcards.shard),
            output=Path(snakemake.output.answers),
            oom_level=snakemake.resources.get("oom_level", 0),
        )
