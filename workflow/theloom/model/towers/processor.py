"""A model's own processor: what makes the numbers that it reads of an image or of a sound."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch

FILES = ("preprocessor_config.json", "processor_config.json")

# Two documents that are as unlike as they come: a processor that makes one shape of them has one
_PROBES = {"images": ((48, 32, 3), (32, 56, 3)), "audio": ((16_000,), (20_000,))}


@dataclass(frozen=True)
class Processor:
    """The processor of a model's folder.

    Attributes:
        own: the object of transformers.
        modality: `images` or `audio`.
        input_name: what its result is called in the model's forward.
        shape: of its result without the axis of the batch; None where it depends on the document.
        digest: SHA-256 of its class and settings.
    """

    own: Any
    modality: str
    input_name: str
    shape: tuple[int, ...] | None
    digest: str

    @property
    def sampling_rate(self) -> int:
        """Samples a second that it takes; 0 for images."""
        return int(getattr(self.own, "sampling_rate", 0) or 0)

    def __call__(self, value: "np.ndarray") -> "torch.Tensor":
        """Process one document.

        Args:
            value: pixels, (height, width, 3) uint8, or samples, (samples,) float32.

        Returns:
            What the model reads, FP32, without the axis of the batch.
        """
        return _processed(self.own, self.modality, self.input_name, value)


def has_processor(folder: Path) -> bool:
    """Whether a model's folder says how images or sounds are processed.

    Args:
        folder: of the model.

    Returns:
        True where it has the file of a processor.
    """
    return any((folder / name).is_file() for name in FILES)


def check_has(folder: Path, modality: str, source: str) -> None:
    """Check that a model's folder says how images or sounds are processed.

    Args:
        folder: of the model.
        modality: `images` or `audio`.
        source: the model, for messages.

    Raises:
        ModelError: it does not.
    """
    if not has_processor(folder):
        raise ModelError(
            f"model.source: {source} has no {FILES[0]}, which says how {modality} are prepared for "
            "the model; fetch it from where the model came from"
        )


def check_same(digest: str, recorded: str, source: str) -> None:
    """Check that a processor is the one that the tokens were made by.

    Args:
        digest: of the processor.
        recorded: in `tokens.h5`.
        source: the model, for messages.

    Raises:
        ModelError: it is another one.
    """
    if digest != recorded:
        raise ModelError(
            f"model.source: the processor of {source} is another one than that of tokens.h5: its "
            "files have changed; run again with --forcerun tokenize_corpus"
        )


def digest_of(said: Any) -> str:
    """The digest of a processor.

    Args:
        said: its class and settings, as plain data.

    Returns:
        SHA-256, in hexadecimal.
    """
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_processor(folder: Path, modality: str, source: str) -> Processor:
    """Load the processor of a model's folder. Images are processed by Pillow everywhere, whatever
    else is installed, so that rows do not depend on it.

    Args:
        folder: of the model.
        modality: `images` or `audio`.
        source: the model, for messages.

    Returns:
        The processor.

    Raises:
        ModelError: there is none, or it is broken.
    """
    check_has(folder, modality, source)
    state = tuple((folder / name).stat().st_mtime_ns for name in FILES if (folder / name).is_file())
    return _load(folder, modality, source, state)


@lru_cache(maxsize=8)
def _load(folder: Path, modality: str, source: str, state: tuple[int, ...]) -> Processor:
    import numpy as np
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        own: Any = (
            AutoImageProcessor.from_pretrained(folder, backend="pil")
            if modality == "images"
            else AutoFeatureExtractor.from_pretrained(folder)
        )
        (name, *_) = own.model_input_names
        said = [type(own).__name__, json.loads(own.to_json_string())]
        probes = _PROBES[modality]
        kind = "u1" if modality == "images" else "f4"
        shapes = {tuple(_processed(own, modality, name, np.zeros(p, kind)).shape) for p in probes}
    except Exception as error:  # whatever transformers raises at a file is a fault of its values
        raise ModelError(
            f"model.source: the processor of {source} does not take {modality}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    shape = shapes.pop() if len(shapes) == 1 else None
    return Processor(own, modality, name, shape, digest_of(said))


def _processed(own: Any, modality: str, name: str, value: "np.ndarray") -> "torch.Tensor":
    options = {"return_tensors": "pt"}
    if modality == "audio":
        options["sampling_rate"] = own.sampling_rate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a silent clip has no variance
        found: torch.Tensor = own(value, **options)[name][0]
    return found.float()
