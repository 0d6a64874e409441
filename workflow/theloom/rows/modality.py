"""What a model reads where that is no text: a tower of images or audio, marked on its config."""

from typing import TYPE_CHECKING

from theloom.rows.tower_inputs import Sample, fixed_shape, mark_samples, samples_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SENSED = ("images", "audio")
"""The kinds of corpora whose documents are no texts, and what a model reads of them."""

INPUT_FILE, INPUT_HASH, INPUT_SHAPE = "input_file", "input_sha256", "input_shape"
"""The columns that say of which file each document's rows are, of which bytes, and in which shape
the processor gives it to the model.
"""

INPUT_IMAGES = "input_images"
"""The column that says which images each conversation has, and of which bytes: a list for each
document, of objects with `file`, or `row` and `image`, and `sha256`.
"""

SOURCE_ROWS = "source_rows"
"""The column of a run whose rows are those of a decoder behind an encoder of audio: rows that the
encoder makes of each document.
"""

CHAT = "chat"  # a model of texts and images, whose conversations have both
TEXT = "text"  # the text half of a model that compares texts to images or audio

# attributes of a model's config
_MODALITY, _HALF = "theloom_modality", "theloom_half_of"
_SOURCE = "theloom_source"


def mark_half(config: "PretrainedConfig", whole: str) -> None:
    """Say on a config that its model is one half of the one in the files.

    Args:
        config: Of the half; it is changed.
        whole: The model type of the one in the files.
    """
    setattr(config, _HALF, whole)


def half_of(config: "PretrainedConfig") -> str:
    """The model type of the files of which a model is one half.

    Args:
        config: Of a model.

    Returns:
        Empty where the model is the one in the files.
    """
    return str(getattr(config, _HALF, ""))


def mark(config: "PretrainedConfig", modality: str, samples: tuple[Sample, ...] = ()) -> None:
    """Say on a model's config that it is read as a tower.

    Args:
        config: Of the tower; it is changed.
        modality: `images`, `audio`, `text` or `chat`.
        samples: Of what its processor makes of documents; none: that is not known.
    """
    setattr(config, _MODALITY, modality)
    mark_samples(config, samples)


def mark_source(config: "PretrainedConfig", kind: str, samples: tuple[Sample, ...] = ()) -> None:
    """Say on a model's config that it is read as a decoder of texts behind an encoder of audio.

    Args:
        config: Of the whole model; it is changed.
        kind: What the encoder reads: `audio`.
        samples: Of what its processor makes of documents; none: that is not known.
    """
    setattr(config, _SOURCE, kind)
    mark_samples(config, samples)


def source_of(config: "PretrainedConfig") -> str:
    """What the encoder reads of a model whose rows are the decoder's, where that is no text.

    Args:
        config: Of a model.

    Returns:
        `audio`; empty for any other model.
    """
    return str(getattr(config, _SOURCE, ""))


def sensed_by(config: "PretrainedConfig") -> str:
    """What a model is given that is no text: a tower, or a decoder behind one.

    Args:
        config: Of a model.

    Returns:
        `images` or `audio`; empty where it is given neither, and for conversations with images.
    """
    found = source_of(config) or modality_of(config)
    return found if found in SENSED else ""


def modality_of(config: "PretrainedConfig") -> str:
    """What a tower reads.

    Args:
        config: Of a model.

    Returns:
        `images`, `audio`, `text` or `chat`; empty where the model is neither a tower nor one of
        texts and images.
    """
    return str(getattr(config, _MODALITY, ""))


def input_shape(config: "PretrainedConfig") -> tuple[int, ...] | None:
    """The shape of a tower's input where it is the same for every document.

    Args:
        config: Of a model.

    Returns:
        Its axes but for that of the batch, such as channels, height and width; None where there is
        no such shape.
    """
    return fixed_shape(samples_of(config))


def image_shape(config: "PretrainedConfig") -> tuple[int, ...]:
    """The shape of an image of a model's own size.

    Args:
        config: Of a tower of images.

    Returns:
        Channels, height and width: as its processor makes every image, else as its config says;
        224 pixels where neither says anything.
    """
    if (fixed := input_shape(config)) is not None:
        return fixed
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size or 224, size or 224)
    return (getattr(config, "num_channels", 3), height, width)


def senses(config: "PretrainedConfig") -> bool:
    """Whether a model's rows are those of patches or frames instead of tokens.

    Args:
        config: Of a model.

    Returns:
        True for a tower of images or audio.
    """
    return modality_of(config) in SENSED
