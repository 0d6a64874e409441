"""What a processor makes of documents of known sizes: by it a tower is given inputs of its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# attributes of a model's config
_SAMPLES, _VALUES = "theloom_input_samples", "theloom_input_values"


@dataclass(frozen=True)
class Part:
    """One input of a model, of one document.

    Attributes:
        name: of the argument of the model's forward.
        shape: with the axis of the batch, which packed patches have not.
        dtype: its name in torch, such as `int64`.
        values: of a part of integers or booleans; None: they are floats, of which only the shape
            counts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[int, ...] | None = None

    @property
    def masks(self) -> bool:
        """Whether it says which rows are real."""
        return self.values is not None and "mask" in self.name


Sample = tuple[Part, ...]
"""The inputs of one document, the main one first."""


def part_of(name: str, value: "torch.Tensor") -> Part:
    """Describe an input of a model.

    Args:
        name: of the argument of its forward.
        value: of one document.

    Returns:
        Its shape, and the values where they are integers.
    """
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_floating_point():
        return Part(name, tuple(value.shape), dtype)
    return Part(name, tuple(value.shape), dtype, tuple(int(v) for v in value.flatten().tolist()))


def mark_samples(config: "PretrainedConfig", samples: tuple[Sample, ...]) -> None:
    """Keep samples on a model's config.

    Args:
        config: Of the tower; it is changed.
        samples: Of two documents that are as unlike as they come, and of a large one.
    """
    setattr(config, _SAMPLES, samples)


def samples_of(config: "PretrainedConfig") -> tuple[Sample, ...]:
    """The samples of a tower's input.

    Args:
        config: Of a model.

    Returns:
        Of two documents that are as unlike as they come, and of a large one; none where the
        processor is not known.
    """
    found: tuple[Sample, ...] = getattr(config, _SAMPLES, ())
    return found


def is_packed(samples: tuple[Sample, ...]) -> bool:
    """Whether the patches of all images are one list, which a grid divides into images.

    Args:
        samples: Of a tower's input.

    Returns:
        True for towers of the Qwen2-VL kind.
    """
    return bool(samples) and any(part.name == "grid_thw" for part in samples[0])


def fixed_shape(samples: tuple[Sample, ...]) -> tuple[int, ...] | None:
    """The shape of the main input where it is the same for every document.

    Args:
        samples: Of a tower's input.

    Returns:
        Its axes but for that of the batch, such as channels, height and width; None where there is
        no such shape.
    """
    shapes = {sample[0].shape for sample in samples[:2]}
    return shapes.pop()[1:] if len(shapes) == 1 and not is_packed(samples) else None


def mark_values(config: "PretrainedConfig", known: bool) -> None:
    """Say on a config whether passes without bytes are given real token ids, of whose values the
    model's code makes decisions.

    Args:
        config: Of the model; it is changed.
        known: Whether they are.
    """
    setattr(config, _VALUES, known)


def has_values(config: "PretrainedConfig") -> bool:
    """Whether a model is given integers with values in passes without bytes: a mask or the grid of
    an image, or token ids where its code needs them (`mark_values`).

    Args:
        config: Of a model.

    Returns:
        False where its input is shapes alone.
    """
    of_sample = any(part.values is not None for sample in samples_of(config) for part in sample)
    return of_sample or bool(getattr(config, _VALUES, False))
