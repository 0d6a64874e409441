"""The extract_shard stage: the hidden states of shards, resident or layer by layer."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from theloom.corpus.tokens_file import reading
from theloom.engine.context import ShardJob, read_job
from theloom.store import partial

log = logging.getLogger(__name__)


def extract_shard(
    config_path: Path,
    estimate_path: Path,
    model_path: Path,
    tokens_path: Path,
    shard: int,
    output: Path,
    oom_level: int = 0,
) -> None:
    """`extract_shards` of one shard.

    Args:
        config_path: The frozen config of the stage.
        estimate_path: Path of `estimate.h5`.
        model_path: Path of `model.h5`.
        tokens_path: Path of `tokens.h5`.
        shard: Number of the shard, from 0.
        output: Path of the finished shard.
        oom_level: As of `extract_shards`.
    """
    files = (config_path, estimate_path, model_path, tokens_path)
    extract_shards(*files, {shard: output}, oom_level)


def extract_shards(
    config_path: Path,
    estimate_path: Path,
    model_path: Path,
    tokens_path: Path,
    outputs: Mapping[int, Path],
    oom_level: int = 0,
) -> None:
    """Run the extract_shard stage: write shards of `tokens.h5`, or resume partial ones.

    A model that is resident is loaded once, when the first shard needs it. Layer by layer, each
    shard reads the weights anew. Where there are several shards, none gets its final name before
    all are finished: a job that ends earlier leaves `.finished` and `.partial` files, from which
    the next one goes on.

    Args:
        config_path: The frozen config of the stage.
        estimate_path: Path of `estimate.h5`.
        model_path: Path of `model.h5`.
        tokens_path: Path of `tokens.h5`.
        outputs: Paths of the finished shards by number, from 0; one at least.
        oom_level: How many times batch and chunk are halved from the start, since earlier jobs ran
            out of memory.

    Raises:
        HookError: The model lacks a requested hook point.
        ModelError: The model's files have changed, or it cannot be run as planned.
        MemoryPlanError: Something does not fit; raised before the model is loaded where possible.
        StoppedError: The job was requested to stop; what is committed is resumed by the next one.
    """
    files = (config_path, estimate_path, model_path, tokens_path)
    (number, output), *_ = outputs.items()
    first = read_job(*files, number, output, oom_level)
    if first.run.record.layerwise:
        from theloom.engine.layerwise.shard import extract_layerwise as extract

        if len(outputs) > 1:
            log.info("layer by layer, each of %d shards reads the weights anew", len(outputs))
    else:
        from theloom.engine.resident import KeptModel, extract_resident

        kept = KeptModel(first.run)

        def extract(job: ShardJob) -> None:
            extract_resident(job, kept)

    aside: list[Path] = []
    for position, job in enumerate(_jobs(first, tokens_path, outputs), 1):
        if len(outputs) > 1:
            log.info("shard %d, %d of %d of this job", job.number, position, len(outputs))
        if partial.is_finished(job.output, job.fingerprint):
            log.info("%s: finished by an earlier job, and kept", job.output.name)
        else:
            extract(job)
            if len(outputs) == 1:
                continue
            partial.set_aside(job.output)
        aside.append(job.output)
    partial.name_finished(aside)


def _jobs(first: ShardJob, tokens_path: Path, outputs: Mapping[int, Path]) -> Iterator[ShardJob]:
    """The shards, each read when it is its turn."""
    yield first
    for number, output in list(outputs.items())[1:]:
        shard = reading.read_job(tokens_path, number).shard
        yield replace(first, number=number, tokens=shard, output=output)
