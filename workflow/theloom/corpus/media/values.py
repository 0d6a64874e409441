"""The bytes of a file as pixels or samples: what is damaged, or would be read otherwise than the
model expects, is refused by its name.
"""

import io
import logging
from importlib.util import find_spec
from typing import Any

import numpy as np

from theloom.errors import CorpusError

log = logging.getLogger(__name__)

_NEEDED = {"images": "PIL", "audio": "soundfile"}


def check_installed(kind: str) -> None:
    """Check that what reads a corpus is installed.

    Args:
        kind: `images` or `audio`.

    Raises:
        CorpusError: it is not.
    """
    if find_spec(_NEEDED[kind]) is None:
        package = {"PIL": "Pillow"}.get(_NEEDED[kind], _NEEDED[kind])
        raise CorpusError(
            f"corpus={kind}: needs the package {package}: pip install 'theloom[media]'"
        )


def pixels(content: bytes, place: str) -> np.ndarray:
    """An image as transformers opens one: in RGB, turned as its EXIF data says.

    Args:
        content: the bytes of the file.
        place: of it, for messages.

    Returns:
        (height, width, 3) uint8.

    Raises:
        CorpusError: it is damaged, of a kind that Pillow does not know, or has several frames.
    """
    from PIL import Image, UnidentifiedImageError
    from transformers.image_utils import load_image

    try:
        opened = Image.open(io.BytesIO(content))
        frames = getattr(opened, "n_frames", 1)
        found = np.asarray(load_image(opened))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, MemoryError) as error:
        raise _damaged(place, "image", error) from None
    except Image.DecompressionBombError as error:
        raise CorpusError(f"{place}: {' '.join(str(error).split())}; make it smaller") from None
    if frames > 1:
        raise CorpusError(f"{place}: has {frames} frames; write the one that is meant as a file")
    return found


def samples(content: bytes, place: str, rate: int) -> np.ndarray:
    """A clip as samples. Channels are averaged, as `datasets` does.

    Args:
        content: the bytes of the file.
        place: of it, for messages.
        rate: samples a second that the model takes.

    Returns:
        (samples,) float32.

    Raises:
        CorpusError: it is damaged, or has another rate.
    """
    import soundfile

    try:
        found, own = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise _damaged(place, "audio file", error) from None
    if own != rate:
        raise CorpusError(
            f"{place}: has {own:,} samples a second, and the model takes {rate:,}; resample it, "
            f"for example with ffmpeg -i FILE -ar {rate} NEW.wav"
        )
    if found.shape[1] > 1:
        log.info("%s: the mean of its %d channels is taken", place, found.shape[1])
    mixed: np.ndarray = found[:, 0] if found.shape[1] == 1 else found.mean(axis=1)
    if not np.isfinite(mixed).all():
        raise CorpusError(f"{place}: has samples that are no finite numbers; write it again")
    return mixed


def _damaged(place: str, what: str, error: Any) -> CorpusError:
    words = " ".join(str(error).split())[:200] or type(error).__name__
    words = words.replace("<_io.BytesIO object", "<file")
    return CorpusError(f"{place}: is no {what} that can be read ({words}); replace or remove it")
