"""crosscoder_learning's activation store: raw shards of rows for each hook point."""

import json

import numpy as np

from theloom.exports.job import Job


def write(job: Job) -> None:
    """Write `<hook point>_out/shard_N.memmap` with its metadata, and the tokens beside.

    A point of the residual stream before a block is that block's input, `_in`.

    Args:
        job: the export.
    """
    import torch

    blocks = list(job.blocks())
    for hook in job.hooks:
        direction = "in" if hook.endswith("_pre") else "out"
        name, shape = f"{hook}_{direction}", job.acts[hook].shape[1:]
        width = int(np.prod(shape))
        for number, rows in enumerate(blocks):
            file = f"{name}/shard_{number}.memmap"
            if job.is_done(file):
                continue
            values = job.rows(hook, rows).reshape(-1, width)
            with job.writing(file) as path:
                (values.view(torch.int16) if job.dtype == "bf16" else values).numpy().tofile(path)
            dtype = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}
            meta = {"shape": [len(values), width], "dtype": dtype[job.dtype]}
            job.write_text(f"{name}/shard_{number}.meta", json.dumps(meta))
        _describe(job, hook, name, width, blocks, direction)
    job.write_torch("tokens.pt", torch.from_numpy(job.acts.input_ids.numpy(...).astype(np.int64)))
    ranges = [*(window.rows.start for window in job.windows), len(job.acts)]
    job.write_torch("sequence_ranges.pt", torch.tensor(ranges, dtype=torch.int64))


def _describe(
    job: Job, hook: str, name: str, width: int, blocks: list[slice], direction: str
) -> None:
    import torch

    config = {
        "batch_size": 1,
        "context_len": max((len(window) for window in job.windows), default=0),
        "shard_size": blocks[0].stop if blocks else 0,
        "d_model": width,
        "io": direction,
        "total_size": len(job.acts),
        "shard_count": len(blocks),
        "store_tokens": True,
        "store_sequence_ranges": True,
    }
    job.write_text(f"{name}/config.json", json.dumps(config, indent=2))
    if job.is_selected:
        job.leave_out("mean and standard deviation, which are of all rows of the file")
        return
    found = job.acts.statistics[hook]
    deviation = torch.from_numpy(np.sqrt(found.variance)).float()
    count = torch.tensor(found.rows, dtype=torch.int64)
    for file, value in {
        "mean": torch.from_numpy(found.mean).float(),
        "std": deviation,
        "M2": torch.from_numpy(found.m2).float(),
        "count": count,
    }.items():
        job.write_torch(f"{name}/{file}.pt", value)
