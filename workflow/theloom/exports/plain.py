"""Formats of no project: `.npy`, safetensors and Parquet, with tokens and documents beside."""

import json
from typing import Any

import numpy as np

from theloom.dataset.companions import columns_of, one_each, plain, token_tables_of
from theloom.errors import ConfigError
from theloom.exports.job import Job


def _tables(job: Job, rows: slice) -> dict[str, np.ndarray]:
    """What is known of the tokens of rows."""
    numbers = np.arange(rows.start, rows.stop)
    return {
        "document": np.searchsorted(job.acts.document_offset, numbers, "right") - 1,
        "position": job.acts.position.numpy(rows),
        "input_id": job.acts.input_ids.numpy(rows),
        **token_tables_of(job.acts, numbers),
    }


def _documents(job: Job) -> str:
    """The documents as JSON: ids, first rows, and columns."""
    columns = {name: column.tolist() for name, column in job.acts.columns.items()}
    documents = {"id": job.acts.documents, "offset": job.acts.document_offset.tolist(), **columns}
    return json.dumps(documents, ensure_ascii=False)


def write_npy(job: Job) -> None:
    """Write `<hook point>.npy`, a file for each table of tokens, and `documents.json`.

    Args:
        job: the export.
    """
    if job.dtype == "bf16":
        job.leave_out("bfloat16, which NumPy lacks: rows are float32")
    for hook in job.hooks:
        name, shape = f"{hook}.npy", job.acts[hook].shape
        if job.is_done(name):
            continue
        with job.writing(name) as path, path.open("wb") as file:
            header = {
                "descr": np.dtype(job.numpy_dtype).str,
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            for rows in job.blocks():
                job.array(hook, rows).tofile(file)
    for name, table in _tables(job, slice(0, len(job.acts))).items():
        with job.writing(f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, table)
    job.write_text("documents.json", _documents(job))


def write_safetensors(job: Job) -> None:
    """Write `rows-N-of-M.safetensors`: hook points by their names, tables as `tokens.<name>`, and
    `documents.json`.

    Args:
        job: the export.
    """
    import torch
    from safetensors.torch import save_file

    size = sum(4 * int(np.prod(job.acts[hook].shape[1:])) for hook in job.hooks)
    parts = list(job.blocks(size))
    for number, rows in enumerate(parts):
        name = f"rows-{number:05d}-of-{len(parts):05d}.safetensors"
        if job.is_done(name):
            continue
        tensors = {hook: job.rows(hook, rows).contiguous() for hook in job.hooks}
        tables = _tables(job, rows)
        tensors |= {f"tokens.{n}": torch.from_numpy(t.copy()) for n, t in tables.items()}
        with job.writing(name) as path:
            save_file(tensors, str(path), {"first_row": str(rows.start)})
    job.write_text("documents.json", _documents(job))


def write_parquet(job: Job) -> None:
    """Write `rows-N-of-M.parquet`: a row for each token, with its document's id and columns.

    Args:
        job: the export.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("parquet needs pyarrow; pip install 'theloom[hub]'") from None
    if job.dtype == "bf16":
        job.leave_out("bfloat16, which Parquet lacks: rows are float32")
    widths = {hook: int(np.prod(job.acts[hook].shape[1:])) for hook in job.hooks}
    parts = list(job.blocks(4 * sum(widths.values())))
    ids = np.array(job.acts.documents, object)
    for number, rows in enumerate(parts):
        name = f"rows-{number:05d}-of-{len(parts):05d}.parquet"
        if job.is_done(name):
            continue
        tables = _tables(job, rows)
        columns: dict[str, Any] = {"id": ids[tables["document"]], **tables}
        columns["input_id"] = one_each(tables["input_id"])
        for column, values in columns_of(job.acts, columns).items():
            columns[column] = pa.array(plain(values)[tables["document"]].tolist())
        for hook, width in widths.items():
            flat = pa.array(job.array(hook, rows).reshape(-1))
            columns[hook] = pa.FixedSizeListArray.from_arrays(flat, width)
        with job.writing(name) as path:
            pq.write_table(pa.table(columns), path)
