"""SAELens' cached activations: a `datasets` folder with contexts of one length.

Rows are before the final norm, as SAELens' hook points are, and columns are named like these.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from theloom.errors import ConfigError
from theloom.exports.contexts import contexts, rows_of, runs
from theloom.exports.job import Job

_FILE_BYTES = 1 << 28  # of a file at most
_FILES = 8  # of a small export at least, so that several are written at once
_LEAST_BYTES = 1 << 25  # of one of these
_BATCH_BYTES = 1 << 23  # of rows that are written at once


def write(job: Job) -> None:
    """Write the folder, which `sae_lens` reads as `cached_activations_path`.

    Args:
        job: the export.

    Raises:
        ConfigError: datasets is not installed, or documents make no contexts.
    """
    try:
        import datasets
        import pyarrow as pa
        from datasets.arrow_writer import ArrowWriter
    except ImportError:
        raise ConfigError("saelens needs datasets; pip install 'theloom[hub]'") from None
    import torch

    size, starts = contexts(job)
    if job.dtype == "bf16":
        job.leave_out("bfloat16, which Arrow lacks: rows are float32")
    if job.fit == "pack":
        job.leave_out("where documents end: a context may hold several")
    array = datasets.Array2D(shape=(size, job.width), dtype=job.numpy_dtype)
    ids = datasets.Sequence(datasets.Value("int32"), length=size)
    features = datasets.Features(dict.fromkeys(job.hooks, array) | {"token_ids": ids})
    each = np.dtype(job.numpy_dtype).itemsize * size * job.width * len(job.hooks)  # bytes
    whole = min(_FILE_BYTES, max(_LEAST_BYTES, -(-each * len(starts) // _FILES)))
    step, batch = max(1, whole // each), max(1, _BATCH_BYTES // each)
    parts = [starts[n : n + step] for n in range(0, len(starts), step)]
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]

    def write_file(number: int, path: Path) -> None:
        part = parts[number]
        memory = torch.empty(
            (len(job.hooks), min(batch, len(part)) * size, job.width),
            dtype=getattr(torch, job.numpy_dtype),
        )
        with (
            pa.OSFile(str(path), "wb") as file,
            ArrowWriter(features=features, stream=file) as writer,
        ):
            for first in range(0, len(part), batch):
                some = part[first : first + batch]
                columns = []
                for hook, rows in zip(job.hooks, memory[:, : len(some) * size], strict=True):
                    filled = 0
                    for run in runs(some, size):
                        job.fill(hook, run.start, rows[filled : filled + run.stop - run.start])
                        filled += run.stop - run.start
                    values = _nested(rows.numpy().reshape(len(some), size, job.width))
                    columns.append(pa.ExtensionArray.from_storage(array(), values))
                tokens = job.acts.input_ids.numpy(rows_of(some, size)).astype(np.int32)
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(tokens), size))
                table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
                writer.write_table(table, len(some))
            writer.finalize()

    job.write_files(names, write_file, each * batch)
    datasets.DatasetInfo(features=features).write_to_directory(str(job.folder))
    _describe(job, size, len(starts), names)


def _nested(values: np.ndarray) -> Any:
    """Lists of lists over the memory of an array (contexts, size, width): nothing is copied."""
    import pyarrow as pa

    contexts, size, width = values.shape
    rows = np.arange(contexts * size + 1, dtype=np.int32) * width
    inner = pa.ListArray.from_arrays(pa.array(rows), pa.array(values.reshape(-1)))
    return pa.ListArray.from_arrays(pa.array(np.arange(contexts + 1, dtype=np.int32) * size), inner)


def _describe(job: Job, size: int, count: int, names: list[str]) -> None:
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": str(job.acts.attributes.get("run_fingerprint", "theloom")),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    job.write_text("state.json", json.dumps(state, indent=2))
    config = {
        "model_name": str(job.acts.attributes.get("model_source", "")),
        "dataset_path": str(job.acts.attributes.get("corpus", "")),
        "hook_name": job.hooks[0],
        "hook_names": job.hooks,
        "d_in": job.width,
        "context_size": size,
        "training_tokens": size * count,
        "dtype": job.numpy_dtype,
    }
    job.write_text("cache_activations_runner_cfg.json", json.dumps(config, indent=2))
