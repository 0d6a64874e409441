"""The processor of a vision-language model: the tokens of a text with images, and what the model
reads beside them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.errors import CorpusError, ModelError
from theloom.model.towers.processor import FILES, check_has, check_torchvision, digest_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_NOT_INPUTS = ("input_ids", "attention_mask", "text_replacement_offsets")
_TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens stand for images, by model
_NAMED_IN = (*FILES[::-1], "tokenizer_config.json")


@dataclass(frozen=True)
class Placed:
    """A text whose images have their tokens.

    Attributes:
        text: the text, in which each image is as many tokens as the model reads of it.
        ids: token ids, as the processor has them.
        spans: of each image: the characters of its placeholder in the text as it was, and those
            that took their place; (images, 2, 2).
        inputs: what the model reads beside the ids, by name.
    """

    text: str
    ids: list[int]
    spans: np.ndarray
    inputs: "dict[str, torch.Tensor]"


@dataclass(frozen=True)
class ChatProcessor:
    """The processor of a model's folder.

    Attributes:
        own: the object of transformers.
        digest: SHA-256 of its class and settings, and those of its image processor.
    """

    own: Any
    digest: str

    def place(self, text: str, images: "Sequence[Image]", special: bool, place: str) -> Placed:
        """Put the tokens of images into a text, and make the model's inputs of them.

        Args:
            text: with a placeholder for each image.
            images: in the order of the text, at least one.
            special: the tokenizer adds its special tokens.
            place: of the text, for messages.

        Returns:
            The text with the images' tokens, and what the model reads.

        Raises:
            CorpusError: there are other placeholders than images, or the processor takes one of
                the images not.
            ModelError: the processor does not tell where the images are.
        """
        made = self._made(text, images, special, place)
        moved = (made.get("text_replacement_offsets") or [[]])[0]
        if len(moved) != len(images) or any(one["type"] != "image" for one in moved):
            raise ModelError(
                f"model.source: {type(self.own).__name__} does not tell where the images of a text "
                "are, so their rows cannot be told; give a model of the LLaVA, Qwen2-VL or Gemma 3 "
                "kind"
            )
        pieces, at, spans = [], 0, []
        for one in moved:
            (start, end), replacement = one["span"], one["replacement"]
            pieces += [text[at:start], replacement]
            new = sum(map(len, pieces))
            spans.append(((start, end), (new - len(replacement), new)))
            at = end
        whole = "".join([*pieces, text[at:]])
        ids = [int(i) for i in made["input_ids"][0]]
        return Placed(whole, ids, np.array(spans, "<i8"), _tensors(made))

    def inputs(
        self, ids: Sequence[int], images: "Sequence[Image]", place: str
    ) -> "dict[str, torch.Tensor]":
        """What a model reads of a document beside its token ids.

        Args:
            ids: of the whole document.
            images: of it, in their order.
            place: of it, for messages.

        Returns:
            By name; the same as those of `place`.

        Raises:
            CorpusError: the processor does not take one of the images.
        """
        import torch

        found = _tensors(self._made(self.own.image_token * len(images), images, False, place))
        types = torch.tensor([self.types(ids).tolist()])
        return {name: types if name in _TYPES else value for name, value in found.items()}

    def types(self, ids: Sequence[int]) -> np.ndarray:
        """Which tokens stand for images.

        Args:
            ids: of a document.

        Returns:
            (tokens,) int64: 0 for a text's token, 1 for an image's, more for other media.
        """
        return np.array(self.own.create_mm_token_type_ids([[*map(int, ids)]])[0], "<i8")

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer puts its special tokens around a rendered conversation, as the
        processor's own `apply_chat_template` has it: not where the template wrote the first one.

        Args:
            text: the rendered conversation.

        Returns:
            True where it does.
        """
        bos = self.own.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _made(
        self, text: str, images: "Sequence[Image]", special: bool, place: str
    ) -> Mapping[str, Any]:
        token = getattr(self.own, "image_token", None)
        if not isinstance(token, str):
            raise ModelError(
                f"model.source: {type(self.own).__name__} has no token that stands for an image; "
                "give a model of the LLaVA, Qwen2-VL or Gemma 3 kind"
            )
        if (count := text.count(token)) != len(images):
            raise CorpusError(
                f"{place}: the rendered conversation has {count} placeholders {token!r} and the "
                f"messages {len(images)} images; give as many images as the text has placeholders, "
                "or a chat template that writes one for each"
            )
        try:
            made: Mapping[str, Any] = self.own(
                text=[text],
                images=list(images),
                add_special_tokens=special,
                return_text_replacement_offsets=True,
            )
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, ZeroDivisionError) as e:
            words = " ".join(str(e).split())[:300]
            raise CorpusError(
                f"{place}: its images are nothing that {type(self.own).__name__} takes ({words}); "
                "take the document out of the corpus"
            ) from None
        return made


def load_chat_processor(folder: Path, model_type: str, source: str) -> ChatProcessor:
    """Load the processor of a vision-language model's folder. Images are processed by Pillow
    everywhere, whatever else is installed, so that rows do not depend on it.

    Args:
        folder: of the model.
        model_type: of its config, for folders that name no class.
        source: the model, for messages.

    Returns:
        The processor.

    Raises:
        ModelError: there is none, or it is broken.
    """
    check_has(folder, "images", source)
    files = [*folder.glob("*.json"), *folder.glob("*.jinja")]
    return _load(folder, model_type, source, tuple(f.stat().st_mtime_ns for f in sorted(files)))


@lru_cache(maxsize=4)
def _load(folder: Path, model_type: str, source: str, state: tuple[int, ...]) -> ChatProcessor:
    from transformers import AutoImageProcessor, AutoTokenizer

    name = _class_name(folder, model_type)
    try:
        whole = _of_images(name)
        settings, _ = whole.get_processor_dict(folder)
        images: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        own = whole.from_args_and_dict([images, tokenizer], settings)
        said = [name, type(images).__name__, *map(json.loads, (images.to_json_string(), _own(own)))]
    except Exception as error:  # whatever transformers raises at a file is a fault of its values
        check_torchvision(error, source)
        raise ModelError(
            f"model.source: the processor of {source} ({name or model_type}) cannot be loaded: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return ChatProcessor(own, digest_of(said))


def _own(processor: Any) -> str:
    """What a processor says of itself, without what varies from one installation to another."""
    found = json.loads(processor.to_json_string())
    parts = ("image_processor", "tokenizer", "chat_template")
    return json.dumps({k: v for k, v in found.items() if k not in parts})


def _class_name(folder: Path, model_type: str) -> str:
    """The class of a folder's processor: the one that its files name, else that of its model."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in _NAMED_IN:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
            if isinstance(found, str):
                return found
    return str(PROCESSOR_MAPPING_NAMES.get(model_type) or "")


def _of_images(name: str) -> Any:
    """A class of processors for texts and images alone: parts for video, which need torchvision,
    are left out.
    """
    import transformers

    whole: Any = getattr(transformers, name, None) if re.fullmatch("[A-Za-z0-9_]+", name) else None
    if whole is None:
        raise ValueError("transformers has no class of processors for it")
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    if parts != ["image_processor", "tokenizer"]:
        raise ValueError(f"its parts are {', '.join(parts)}, not image_processor and tokenizer")

    def get_attributes(cls: Any) -> list[str]:
        return list(parts)

    return type(name, (whole,), {"get_attributes": classmethod(get_attributes)})


def _tensors(made: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    """The model's inputs of one document as tensors, with the axes that the model expects."""
    from transformers import BatchFeature

    kept = {name: value for name, value in made.items() if name not in _NOT_INPUTS}
    return dict(BatchFeature(kept, tensor_type="pt"))
