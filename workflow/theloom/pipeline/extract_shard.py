"""The extract_shard stage: the hidden states of one shard, resident or layer by layer."""

from pathlib import Path

from theloom.engine.context import read_job


def extract_shard(
    config_path: Path,
    estimate_path: Path,
    model_path: Path,
    tokens_path: Path,
    shard: int,
    output: Path,
    oom_level: int = 0,
) -> None:
    """Run the extract_shard stage: write one shard of `tokens.h5`, or resume a partial one.

    Args:
        config_path: The frozen config of the stage.
        estimate_path: Path of `estimate.h5`.
        model_path: Path of `model.h5`.
        tokens_path: Path of `tokens.h5`.
        shard: Number of the shard, from 0.
        output: Path of the finished shard.
        oom_level: How many times batch and chunk are halved from the start, since earlier jobs ran
            out of memory.

    Raises:
        HookError: The model lacks a requested hook point.
        ModelError: The model's files have changed, or it cannot be run as planned.
        MemoryPlanError: Something does not fit; raised before the model is loaded where possible.
        StoppedError: The job was requested to stop; what is committed is resumed by the next one.
    """
    job = read_job(config_path, estimate_path, model_path, tokens_path, shard, output, oom_level)
    if job.run.record.layerwise:
        from theloom.engine.layerwise.shard import extract_layerwise

        extract_layerwise(job)
    else:
        from theloom.engine.resident import extract_resident

        extract_resident(job)
