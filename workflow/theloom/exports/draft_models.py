"""Trainers of draft models: speculators (vLLM) and SpecForge.

The two number layers differently. speculators counts the blocks that a state has passed, and its
last layer is the last block's output, before the final norm. SpecForge counts block outputs from
0, and its last state is after the final norm.
"""

import json
from pathlib import Path

import numpy as np

from theloom.errors import ConfigError
from theloom.exports.job import Job
from theloom.hooks.points import LAST_STATE

_AT_ONCE = 2000  # files of one of SpecForge's folders
_AUXILIARY = 3  # layers that SpecForge's EAGLE-3 takes


def _mask(job: Job, rows: slice) -> np.ndarray:
    """1 for the tokens of the loss: the assistant's, or all where texts are no conversations."""
    mask = job.loss_mask(rows)
    return np.ones(rows.stop - rows.start, np.int64) if mask is None else mask


def _tokens(job: Job, rows: slice) -> np.ndarray:
    return job.acts.input_ids.numpy(rows).astype(np.int64)


def _leave_out(job: Job) -> None:
    """Record what neither format can carry."""
    if job.acts.token_table("role") is None:
        job.leave_out(
            "a loss mask: the texts are no conversations, so that every token is in the loss"
        )
    if job.acts.columns:
        job.leave_out(f"the columns {', '.join(job.acts.columns)}")
    if len(job.windows) > len(job.documents):
        job.leave_out("which windows are one document's: each is a record of its own")


def write_speculators(job: Job) -> None:
    """Write a `datasets` folder of token ids and loss masks, and
    `hidden_states/hs_N.safetensors` for each of its rows.

    Args:
        job: the export.

    Raises:
        ConfigError: not every token has a row, the last hook point is not the last block's output,
            or datasets is not installed.
    """
    try:
        import datasets
        import pyarrow as pa
    except ImportError:
        raise ConfigError("speculators needs datasets; pip install 'theloom[hub]'") from None
    import torch
    from safetensors.torch import save_file

    job.need_every_token("speculators")
    layers, last = job.layers("speculators"), job.last_layer
    if layers[-1] != last:
        raise ConfigError(
            f"speculators takes the last block's output as its last layer; end --hooks with "
            f"blocks.{last - 1}.hook_resid_post, and extract it where the file lacks it"
        )
    width, dtype = job.width, job.torch_dtype
    most = max(len(window) for window in job.windows)

    def write_file(number: int, path: Path) -> None:
        window = job.windows[number].rows
        states = torch.empty((window.stop - window.start, len(job.hooks), width), dtype=dtype)
        for place, hook in enumerate(job.hooks):
            job.fill(hook, window.start, states[:, place])
        tensors = {"hidden_states": states, "token_ids": torch.from_numpy(_tokens(job, window))}
        save_file(tensors, str(path), {"layer_ids": json.dumps(layers)})

    names = [f"hidden_states/hs_{number}.safetensors" for number in range(len(job.windows))]
    job.write_files(names, write_file, most * len(job.hooks) * width * dtype.itemsize)
    everything = slice(0, len(job.acts))
    ids, mask = _tokens(job, everything), _mask(job, everything)
    offsets = np.array([*(w.rows.start for w in job.windows), len(job.acts)])
    numbers = datasets.Sequence(datasets.Value("int64"))
    features = datasets.Features(
        {"input_ids": numbers, "loss_mask": numbers, "seq_len": datasets.Value("int64")}
    )
    columns = [pa.LargeListArray.from_arrays(offsets, values) for values in (ids, mask)]
    columns = [*(c.cast(pa.list_(pa.int64())) for c in columns), pa.array(np.diff(offsets))]
    prepared = datasets.Dataset(pa.Table.from_arrays(columns, schema=features.arrow_schema))
    prepared.save_to_disk(str(job.folder))
    counts = np.bincount(ids[mask == 1])
    frequency = {int(token): int(counts[token]) for token in np.flatnonzero(counts)}
    job.write_torch("token_freq.pt", frequency)
    _leave_out(job)


def write_specforge(job: Job) -> None:
    """Write `rows_M-N/data_K.ckpt`: EAGLE-3 records of three layers and the last hidden state.

    Args:
        job: the export.

    Raises:
        ConfigError: not every token has a row, or the hook points are not three of the residual
            stream and the last hidden state.
    """
    import torch

    job.need_every_token("specforge")
    if LAST_STATE not in job.hooks:
        raise ConfigError(
            f"specforge needs the state after the final norm: add {LAST_STATE} to --hooks, and to "
            "memory.activation_cache_filter where the file lacks it"
        )
    dtype = job.torch_dtype
    auxiliary = [hook for hook in job.hooks if hook != LAST_STATE]
    numbers = [job.number_of_layer(hook) for hook in auxiliary]
    if len(auxiliary) != _AUXILIARY or None in numbers:
        raise ConfigError(
            f"specforge takes {_AUXILIARY} points of the residual stream and {LAST_STATE}; --hooks "
            f"has {', '.join(job.hooks)}"
        )
    job.write_text(
        "layers.json",
        json.dumps({"aux_hidden_state_layers": [n - 1 for n in numbers if n is not None]}),
    )
    most = max(len(window) for window in job.windows)

    def write_file(number: int, path: Path) -> None:
        window = job.windows[number].rows
        layers = torch.empty((1, window.stop - window.start, _AUXILIARY, job.width), dtype=dtype)
        for place, hook in enumerate(auxiliary):
            job.fill(hook, window.start, layers[0, :, place])
        record = {
            "input_ids": torch.from_numpy(_tokens(job, window)),
            "loss_mask": torch.from_numpy(_mask(job, window)),
            "hidden_state": job.rows(LAST_STATE, window)[None],
            "aux_hidden_state": layers.flatten(2),
        }
        torch.save(record, path)

    firsts = [number - number % _AT_ONCE for number in range(len(job.windows))]
    names = [f"rows_{m}-{m + _AT_ONCE}/data_{n}.ckpt" for n, m in enumerate(firsts)]
    job.write_files(names, write_file, most * len(job.hooks) * job.width * dtype.itemsize)
    _leave_out(job)
