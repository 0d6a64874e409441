"""A model's own processor: what makes the numbers that it reads of an image or of a sound."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theloom.errors import ModelError
from theloom.rows.tower_inputs import Sample, fixed_shape, is_packed, part_of

if TYPE_CHECKING:
    import numpy as np
    import torch

FILES = ("preprocessor_config.json", "processor_config.json")

# Two documents that are as unlike as they come: a processor that makes one shape of them has one.
# The third is the largest that a run is planned for where no length is named
_PROBES = {
    "images": ((48, 32, 3), (32, 56, 3), (512, 512, 3)),
    "audio": ((16_000,), (20_000,), (480_000,)),
}


@dataclass(frozen=True)
class Processor:
    """The processor of a model's folder.

    Attributes:
        own: the object of transformers.
        modality: `images` or `audio`.
        names: what its results are called in the model's forward, the main input first.
        samples: what it makes of documents of known sizes.
        digest: SHA-256 of its class and settings.
    """

    own: Any
    modality: str
    names: Mapping[str, str]
    samples: tuple[Sample, ...]
    digest: str

    @property
    def input_name(self) -> str:
        """What its main result is called in the model's forward."""
        return next(iter(self.names.values()))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of its main result without the axis of the batch; None where it depends on the
        document.
        """
        return fixed_shape(self.samples)

    @property
    def packed(self) -> bool:
        """Whether patches come as one list with a grid, one image at a time."""
        return is_packed(self.samples)

    @property
    def longest(self) -> int | None:
        """Samples of the longest clip, where all are padded or cut to one length; None: the
        processor does not tell.
        """
        import torch

        named = getattr(self.own, "n_samples", None)
        if isinstance(named, int):
            return named
        frames = getattr(self.own, "max_length", None)
        if not isinstance(frames, int):
            return None
        step = self.sampling_rate // 100  # of features 10 ms apart, as of AST
        found = frames * step
        whole = torch.linspace(-1, 1, found).numpy()
        other = whole.copy()
        other[-2 * step :] *= -1
        pair = [self(clip)[self.input_name] for clip in (whole, other)]
        return None if torch.equal(*pair) else found

    def shape_in(self, inputs: "Mapping[str, torch.Tensor]") -> tuple[int, ...]:
        """The shape by which documents may share a pass.

        Args:
            inputs: of one document.

        Returns:
            Axes of the main input without that of the batch.
        """
        shape = tuple(inputs[self.input_name].shape)
        return shape if self.packed else shape[1:]

    @property
    def sampling_rate(self) -> int:
        """Samples a second that it takes; 0 for images."""
        return int(getattr(self.own, "sampling_rate", 0) or 0)

    def __call__(self, value: "np.ndarray") -> "dict[str, torch.Tensor]":
        """Process one document.

        Args:
            value: pixels, (height, width, 3) uint8, or samples, (samples,) float32.

        Returns:
            What the model reads, by its names: floats in FP32.
        """
        masked = "input_features_mask" in self.names.values()
        made = _processed(self.own, self.modality, value, masked)
        return {new: made[name] for name, new in self.names.items()}


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


def load_processor(folder: Path, modality: str, source: str, whole: Any = None) -> Processor:
    """Load the processor of a model's folder. Images are processed by Pillow everywhere, whatever
    else is installed, so that rows do not depend on it.

    Args:
        folder: of the model.
        modality: `images` or `audio`.
        source: the model, for messages.
        whole: the class of the model, which says by what names it is given the results; None: the
            main one alone is given.

    Returns:
        The processor.

    Raises:
        ModelError: there is none, or it is broken.
    """
    check_has(folder, modality, source)
    state = tuple((folder / name).stat().st_mtime_ns for name in FILES if (folder / name).is_file())
    return _load(folder, modality, source, whole, state)


@lru_cache(maxsize=8)
def _load(
    folder: Path, modality: str, source: str, whole: Any, state: tuple[int, ...]
) -> Processor:
    import numpy as np
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    takes = () if whole is None else tuple(signature(whole.forward).parameters)
    try:
        own: Any = (
            AutoImageProcessor.from_pretrained(folder, backend="pil")
            if modality == "images"
            else AutoFeatureExtractor.from_pretrained(folder)
        )
        (main, *_) = own.model_input_names
        said = [type(own).__name__, json.loads(own.to_json_string())]
        kind, masked = "u1" if modality == "images" else "f4", "input_features_mask" in takes
        made = [
            _processed(own, modality, np.zeros(shape, kind), masked) for shape in _PROBES[modality]
        ]
        names = _names(made[0], main, takes)
    except Exception as error:  # whatever transformers raises at a file is a fault of its values
        check_torchvision(error, source)
        raise ModelError(
            f"model.source: the processor of {source} does not take {modality}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    samples = tuple(tuple(part_of(new, one[name]) for name, new in names.items()) for one in made)
    return Processor(own, modality, names, samples, digest_of(said))


def check_torchvision(error: Exception, source: str) -> None:
    """Say what to install where a processor needs torchvision: a few have no Pillow form.

    Args:
        error: what loading the processor raised.
        source: the model, for messages.

    Raises:
        ModelError: torchvision is missing, or is a build for another torch.
    """
    if "torchvision" not in str(error).lower():
        return
    import torch

    version, _, build = torch.__version__.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    raise ModelError(
        f"model.source: the processor of {source} needs torchvision, in the build that goes with "
        f"torch {torch.__version__}: pip install torch=={version} torchvision{index}"
    ) from None


def _names(made: "Mapping[str, torch.Tensor]", main: str, takes: tuple[str, ...]) -> dict[str, str]:
    """What each result is called in the model's forward, the main one first. Raw sound has no
    padding, and so no mask.
    """
    packed = "grid_thw" in takes and "pixel_values" not in takes
    found = {main: "hidden_states" if main == "pixel_values" and packed else main}
    for name in made if main != "input_values" else ():
        plain = name.removeprefix("image_")
        others = (name, plain, f"pixel_{plain}", _MASKS.get(name, name))
        new = next((n for n in others if n in takes), None)
        if new is not None and name != main and new not in found.values():
            found[name] = new
    return found


_MASKS = {"attention_mask": "input_features_mask"}


def _processed(
    own: Any, modality: str, value: "np.ndarray", masked: bool
) -> "dict[str, torch.Tensor]":
    import torch

    options: dict[str, Any] = {"return_tensors": "pt"}
    if modality == "audio":
        options["sampling_rate"] = own.sampling_rate
        if masked:
            options["return_attention_mask"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a silent clip has no variance
        made = own(value, **options)
    tensors = {name: found for name, found in made.items() if isinstance(found, torch.Tensor)}
    main = tensors[own.model_input_names[0]]
    if modality == "images" and main.ndim == 5:  # the tiles of an image
        if main.shape[1] > 1:
            raise ValueError(
                f"it cuts an image into {main.shape[1]} tiles; set do_image_splitting to false in "
                f"{FILES[0]}, so that an image is one document"
            )
        tensors = {name: found.squeeze(1) for name, found in tensors.items()}
    return {
        name: found.float() if found.is_floating_point() else found
        for name, found in tensors.items()
    }
