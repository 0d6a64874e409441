"""Trainers of draft models: speculators (vLLM) and SpecForge.

The two number layers differently. speculators counts the blocks that a state has passed, and its
last layer is the last block's output, before the final norm. SpecForge counts block outputs from
0, and its last state is after the final norm.
"""

import json

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
    assert job.width  # of one width
    frequency: dict[int, int] = {}
    conversations = []
    for number, window in enumerate(job.windows):
        ids, mask = _tokens(job, window.rows), _mask(job, window.rows)
        conversations.append({"input_ids": ids, "loss_mask": mask, "seq_len": len(window)})
        for token, count in zip(*np.unique(ids[mask == 1], return_counts=True), strict=True):
            frequency[int(token)] = frequency.get(int(token), 0) + int(count)
        name = f"hidden_states/hs_{number}.safetensors"
        if job.is_done(name):
            continue
        states = torch.stack([job.rows(hook, window.rows) for hook in job.hooks], dim=1)
        tensors = {"hidden_states": states.contiguous(), "token_ids": torch.from_numpy(ids)}
        with job.writing(name) as path:
            save_file(tensors, str(path), {"layer_ids": json.dumps(layers)})

    numbers = datasets.Sequence(datasets.Value("int64"))
    features = datasets.Features(
        {"input_ids": numbers, "loss_mask": numbers, "seq_len": datasets.Value("int64")}
    )
    prepared = datasets.Dataset.from_list(conversations, features=features)
    prepared.save_to_disk(str(job.folder))
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
    assert job.width  # of one width
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
    for number, window in enumerate(job.windows):
        first = number - number % _AT_ONCE
        name = f"rows_{first}-{first + _AT_ONCE}/data_{number}.ckpt"
        if job.is_done(name):
            continue
        layers = torch.cat([job.rows(hook, window.rows) for hook in auxiliary], dim=-1)
        record = {
            "input_ids": torch.from_numpy(_tokens(job, window.rows)),
            "loss_mask": torch.from_numpy(_mask(job, window.rows)),
            "hidden_state": job.rows(LAST_STATE, window.rows)[None],
            "aux_hidden_state": layers[None],
        }
        job.write_torch(name, record)
    _leave_out(job)
