"""SAELens' cached activations: a `datasets` folder with contexts of one length.

Rows are before the final norm, as SAELens' hook points are, and columns are named like these.
"""

import json
from typing import Any

import numpy as np

from theloom.errors import ConfigError
from theloom.exports.contexts import contexts, rows_of
from theloom.exports.job import Job

_FILE_BYTES = 1 << 28


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
        from datasets.features.features import numpy_to_pyarrow_listarray
    except ImportError:
        raise ConfigError("saelens needs datasets; pip install 'theloom[hub]'") from None

    size, starts = contexts(job)
    if job.dtype == "bf16":
        job.leave_out("bfloat16, which Arrow lacks: rows are float32")
    if job.fit == "pack":
        job.leave_out("where documents end: a context may hold several")
    array = datasets.Array2D(shape=(size, job.width), dtype=job.numpy_dtype)
    ids = datasets.Sequence(datasets.Value("int32"), length=size)
    features = datasets.Features(dict.fromkeys(job.hooks, array) | {"token_ids": ids})
    step = max(1, _FILE_BYTES // (4 * size * job.width * len(job.hooks)))
    parts = [starts[n : n + step] for n in range(0, len(starts), step)]
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        if job.is_done(name):
            continue
        rows, shape = rows_of(part, size), (len(part), size, job.width)
        columns = [
            pa.ExtensionArray.from_storage(
                array(), numpy_to_pyarrow_listarray(job.array(hook, rows).reshape(shape))
            )
            for hook in job.hooks
        ]
        tokens = job.acts.input_ids.numpy(rows).astype(np.int32)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(tokens), size))
        table = pa.Table.from_arrays(columns, schema=features.arrow_schema)
        with job.writing(name) as path, ArrowWriter(features=features, path=str(path)) as writer:
            writer.write_table(table, writer_batch_size=1)
            writer.finalize()
    datasets.DatasetInfo(features=features).write_to_directory(str(job.folder))
    _describe(job, size, len(starts), names)


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
