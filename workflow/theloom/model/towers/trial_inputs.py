"""Inputs of a tower that stand for any document: of the sizes that its processor makes."""

import math
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import stages_of
from theloom.errors import ModelError
from theloom.rows.modality import image_shape, input_shape, sensed_by, source_of
from theloom.rows.tower_inputs import Part, Sample, is_packed, samples_of

if TYPE_CHECKING:
    import torch

_SECONDS = 1.0  # of sound in a trial that asks for no more rows than that has
_LONGEST_SECONDS = 30.0  # of sound that a run is planned for where it names no number of rows
_RATE = 16_000  # samples a second that models of raw sound take

# parameters that stand before the patches as rows of their own
_ROWS_BEFORE = ("cls_token", "class_embedding", "register_tokens", "distillation_token")

# methods of transformers that give the rows of so many frames
_LENGTHS = ("_get_subsampling_output_length", "_get_feat_extract_output_lengths")


def trial_inputs(model: Any, windows: int, rows: int) -> "dict[str, torch.Tensor]":
    """Inputs of a tower that stand for any document.

    Args:
        model: the tower, real or fake.
        windows: how many side by side.
        rows: that each shall have, at least, where the size of the model's input is free.

    Returns:
        By name in the model's forward: the main one (windows, …), in the dtype and on the device
        of the model, of a few different values.
    """
    return _filled(model, _sized(model, rows), windows)


def longest_inputs(model: Any) -> "dict[str, torch.Tensor]":
    """Inputs of the largest document that a run is planned for where its config names no number.

    Args:
        model: the tower.

    Returns:
        By name, of one document: an image of the model's own size, or 30 seconds of sound.
    """
    samples = samples_of(model.config)
    free = sensed_by(model.config) == "audio" and input_shape(model.config) is None
    if free and model.main_input_name != "input_features":
        shape = (1, int(_LONGEST_SECONDS * _RATE))
        return _filled(model, (Part(model.main_input_name, shape, "float32"),), 1)
    if is_packed(samples):  # small images may be made larger than the large one
        return _filled(model, max(samples, key=lambda sample: sample[0].shape[0]), 1)
    if samples and free:
        axis = max(range(1, len(samples[2][0].shape)), key=lambda a: samples[2][0].shape[a])
        encoder = source_of(model.config) and getattr(model.config, "encoder_config", None)
        most = getattr(encoder or model.config, "max_position_embeddings", None) or 0
        if 0 < most < rows_of_frames(model, samples[2][0].shape[axis]):
            return trial_inputs(model, 1, most)
        return _filled(model, samples[2], 1)
    return trial_inputs(model, 1, 0)


def _sized(model: Any, rows: int) -> Sample:
    """The inputs of one document of so many rows."""
    samples = samples_of(model.config)
    if is_packed(samples):
        return _grid(model, samples[0], rows)
    if samples and input_shape(model.config) is not None:
        return samples[0]
    if samples and len(samples[0][0].shape) == 3 and model.main_input_name == "input_features":
        return _frames(model, samples, rows)
    main = Part(model.main_input_name, (1, *shape_of(model, rows)), "float32")
    others = samples[0][1:] if samples else ()
    if any(not part.masks or len(part.shape) != 3 for part in others):
        raise ModelError(
            f"{model.config.model_type}: its processor makes {others[0].name} of each image, whose "
            "values for another size TheLoom does not know; give a model of images of one size"
        )
    size = (1, *main.shape[-2:])
    return (main, *(Part(p.name, size, p.dtype, (1,) * math.prod(size)) for p in others))


def _grid(model: Any, sample: Sample, rows: int) -> Sample:
    """Packed patches of an image of so many patches at least, in whole merge windows."""
    merge = int(getattr(model.config, "spatial_merge_size", None) or _merged(sample) or 1)
    units = max(1, -(-rows // merge**2))
    height = max((h for h in range(1, math.isqrt(units) + 1) if units % h == 0), default=1)
    if units // height > 4 * height:  # no image is so long: one of some rows more
        height = math.isqrt(units)
    grid = (1, height * merge, -(-units // height) * merge)
    main = Part(sample[0].name, (grid[1] * grid[2], *sample[0].shape[1:]), sample[0].dtype)
    others = (
        Part(p.name, (1, 3), p.dtype, grid) if p.name == "grid_thw" else p for p in sample[1:]
    )
    return (main, *others)


def _merged(sample: Sample) -> int:
    found = next((p.values for p in sample if p.name == "merge_sizes"), None)
    return found[0] if found else 2


def _frames(model: Any, samples: tuple[Sample, ...], rows: int) -> Sample:
    """Features of a clip of so many rows."""
    one, two = samples[0][0].shape, samples[1][0].shape
    axis = next(a for a in range(len(one)) if one[a] != two[a])
    frames, more = one[axis], one[axis]
    while rows_of_frames(model, more) < rows:
        frames, more = more, 2 * more
    while more - frames > 1:  # the most frames of so many rows
        middle = (frames + more) // 2
        frames, more = (middle, more) if rows_of_frames(model, middle) <= rows else (frames, middle)
    if rows_of_frames(model, frames) < rows:
        frames = more
    made = []
    for part in samples[0]:
        shape = tuple(frames if n == one[axis] and a else n for a, n in enumerate(part.shape))
        values = None if part.values is None else (1,) * math.prod(shape)
        if values is not None and not part.masks:
            raise ModelError(
                f"{model.config.model_type}: its processor makes {part.name} of each clip, whose "
                "values for another length TheLoom does not know"
            )
        made.append(Part(part.name, shape, part.dtype, values))
    return tuple(made)


def rows_of_frames(model: Any, frames: int) -> int:
    """Rows that a model makes of so many frames of features, as its own methods have it; else by
    the strides of the convolutions before its blocks.

    Args:
        model: a tower of audio.
        frames: of a clip.

    Returns:
        Their number.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    part = getattr(model, "encoder", model)
    for name in _LENGTHS:
        method = getattr(model, name, None) or getattr(part, name, None)
        if method is not None:
            with _disable_current_modes():
                found = method(torch.tensor([frames]))
                last = found[-1] if isinstance(found, tuple) else found  # of several steps the last
                return int(last.reshape(-1)[0])
    strides = [m.stride[0] for axes in (1, 2) for m in _convolutions(part, axes)]
    return -(-frames // max(1, math.prod(strides)))


def _filled(model: Any, sample: Sample, windows: int) -> "dict[str, torch.Tensor]":
    """Inputs of these shapes, the same for each of several windows."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    made: dict[str, torch.Tensor] = {}
    for part in sample:
        shape = (windows * part.shape[0], *part.shape[1:])
        if part.values is None:
            value = torch.zeros(shape, dtype=model.dtype, device=model.device)
            for step, filled in ((3, 0.9), (5, -0.7), (7, 0.4), (11, -0.3), (13, 0.6)):
                value.view(-1)[::step].fill_(filled)
            made[part.name] = value
            continue
        with unset_fake_temporarily():  # their values count
            values = torch.tensor(part.values, dtype=getattr(torch, part.dtype))
            value = values.reshape(part.shape)
            if part.masks:
                value = torch.ones_like(value)
            made[part.name] = torch.cat([value] * windows).to(model.device)
    return made


def shape_of(model: Any, rows: int) -> tuple[int, ...]:
    """The shape of an input that has a number of rows.

    Args:
        model: the tower.
        rows: at least; a model whose input has one size alone has those of that.

    Returns:
        Axes without that of the batch.
    """
    config = model.config
    fixed = input_shape(config)
    if sensed_by(config) == "images":
        return _image(model, rows, fixed)
    if fixed is not None:
        return fixed
    if model.main_input_name == "input_features":
        part = getattr(model, "encoder", model)
        strides = [m.stride[0] for m in _convolutions(part, 1)]
        try:
            return config.num_mel_bins, config.max_source_positions * math.prod(strides)
        except AttributeError:
            raise ModelError(
                f"{config.model_type}: takes features of clips of any length, and its config does "
                "not say how many rows they have; TheLoom reads models of raw sound, and those of "
                "features whose clips are padded to one length"
            ) from None
    return (_samples(model, rows),)


def _convolutions(module: Any, axes: int) -> list[Any]:
    from torch import nn

    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    return [m for m in module.modules() if isinstance(m, kind)]


def _samples(model: Any, rows: int) -> int:
    """Samples of which the convolutions of a model of raw sound make so many frames."""
    samples = rows
    front = getattr(model, "feature_extractor", None) or getattr(model, "encoder", model)
    for layer in reversed(_convolutions(front, 1)):
        samples = (samples - 1) * layer.stride[0] + layer.kernel_size[0]
    return max(samples, int(_SECONDS * _RATE))


def rows_before(model: Any) -> int:
    """Rows before the patches of an image: the class token and registers.

    Args:
        model: a tower of images.

    Returns:
        Their number.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _ROWS_BEFORE
    }
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in found.values())


def patch_size(model: Any) -> tuple[int, int] | None:
    """Height and width of a patch, by the convolution that embeds it.

    Args:
        model: a tower of images.

    Returns:
        Pixels; None where no convolution takes patches that do not overlap.
    """
    for layer in _convolutions(model, 2):
        if layer.stride == layer.kernel_size and max(layer.stride) > 1:
            return layer.stride
    return None


def _image(model: Any, rows: int, fixed: tuple[int, ...] | None) -> tuple[int, ...]:
    """Channels, height and width of an image of so many rows."""
    if fixed is not None:
        return fixed
    own, patch = image_shape(model.config), patch_size(model)
    _, height, width = own
    whole: Any = type(model).__mro__[1]
    strict = "interpolate_pos_encoding" in signature(whole.forward).parameters
    wanted = rows - rows_before(model)
    if patch is None or strict or wanted < 4 or stages_of(model.config):
        return own
    if wanted == (height // patch[0]) * (width // patch[1]):
        return own
    height = max((h for h in range(1, math.isqrt(wanted) + 1) if wanted % h == 0), default=1)
    if wanted // height > 4 * height:  # no image is so long: one of some rows more
        height = math.isqrt(wanted)
    return own[0], height * patch[0], -(-wanted // height) * patch[1]
