"""Passes over conversations with images: that their rows are the model's own, and the memory they
take, as the vision part runs before the blocks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from theloom.config.schema import ModelConfig
from theloom.corpus.media.chat_inputs import with_images
from theloom.errors import ModelError
from theloom.hooks.points import HookPoint
from theloom.memory import trace
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model.loading import LoadedModel
from theloom.model.towers.check import images_check
from theloom.model.weight_format import WeightFormat
from theloom.terminal import format_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImagesPass:
    """The pass with images that takes the most memory.

    Attributes:
        tokens: of the document.
        bytes: at the peak, pixels included, without the weights.
        method: `trace`, or `measured` where the model's code does not run without values.
    """

    tokens: int
    bytes: int
    method: str


def largest_images_pass(
    model: ModelConfig,
    tokens_path: Path,
    loaded: LoadedModel,
    traced: Traced,
    kind: WeightFormat,
    points: Sequence[HookPoint],
) -> ImagesPass | None:
    """What the largest conversation with images takes. The shortest one shows before that the rows
    are the model's own.

    Args:
        model: the `model` settings.
        tokens_path: path of `tokens.h5`.
        loaded: the model.
        traced: its estimator.
        kind: format of its weights.
        points: hook points that are captured.

    Returns:
        The pass; None where the run has no images.

    Raises:
        CorpusError: an image is no longer what it was.
        ModelError: its rows would not be what the model computes.
    """
    found = []
    for ids, inputs in with_images(tokens_path, model, shortest=True):
        images_check(loaded.architecture, _row(ids), inputs, loaded.tolerance)
    for ids, inputs in with_images(tokens_path, model):
        workload = Workload(1, len(ids), len(ids))
        device, method = loaded.device.type, "trace"
        try:
            peak = traced.forward(kind, workload, points, device=device, inputs=inputs)
        except ModelError as error:
            log.warning("memory of images is measured instead of predicted: %s", error)
            method = "measured"
            given = {n: v.to(loaded.device) for n, v in inputs.items()}
            measured, _ = trace.run(
                loaded.architecture,
                _row(ids).to(loaded.device),
                workload,
                points,
                store=kind.precision,
                device=device,
                inputs=given,
            )
            peak = trace.parts(measured)
        pixels = sum(value.nbytes for value in inputs.values())
        found.append(ImagesPass(len(ids), peak.total + pixels, method))
    if not found:
        return None
    most = max(found, key=lambda one: one.bytes)
    log.info(
        "largest pass with images: %d tokens, %s (%s)",
        most.tokens,
        format_bytes(most.bytes),
        most.method,
    )
    return most


def _row(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(ids.astype("<i8"))[None]
