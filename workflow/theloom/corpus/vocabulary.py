"""Whether a model's token embedding has a row for every token of a corpus, or for every code."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from theloom.config.schema import ModelConfig
from theloom.corpus.rows import kind
from theloom.errors import CorpusError, printable
from theloom.model.checkpoint.codes import codebooks
from theloom.model.files import hf_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LARGEST = np.iinfo("<i4").max  # ids are stored as int32


class Vocabulary:
    """The ids that a model takes.

    Args:
        config: the `model` settings.

    Raises:
        ModelError: the model's own config cannot be read.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._model = config
        self._hf = hf_config(config)
        self._rows = getattr(self._hf.get_text_config(), "vocab_size", None) or 0
        self._looked = False
        self._codebooks = codebooks(self._hf)

    def check(self, ids: Sequence[Any], document: str, tokenizer: Any) -> np.ndarray:
        """The ids of a document as int32.

        Args:
            ids: what the tokenizer or the corpus gave, at least one; for a model of codes those of
                each position (`positions_of`).
            document: the document's id, for the message.
            tokenizer: the tokenizer, which names the token; None where the corpus has the ids.

        Returns:
            (tokens,) of int32; of codes (tokens, codebooks).

        Raises:
            CorpusError: one is no id, or the embedding has no row for it.
        """
        if self._codebooks:
            flat = [code for position in ids for code in position]
            return self._check(flat, document, tokenizer).reshape(len(ids), self._codebooks)
        return self._check(ids, document, tokenizer)

    def _check(self, ids: Sequence[Any], document: str, tokenizer: Any) -> np.ndarray:
        what = "code" if self._codebooks else "token id"
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of uneven length
            array = np.empty(0)
        if (
            array.ndim != 1
            or array.dtype.kind not in "iu"
            or array.min() < 0
            or array.max() > _LARGEST
            or (tokenizer is None and bool in map(type, ids))
        ):
            wrong = (i for i in ids if type(i) is not int or not 0 <= i <= _LARGEST)
            source, advice = (
                ("corpus.input_ids", "correct the row, or set corpus.input_ids to another column")
                if tokenizer is None
                else ("the tokenizer", "set model.tokenizer to a tokenizer of this model")
            )
            raise CorpusError(
                f"document {document}: {source} gives {printable(repr(next(wrong, ids[0])))[:80]}, "
                f"which is no {what}; {advice}"
            )
        if array.max() >= self._rows and not self._looked:
            # some models have more rows than vocab_size: of prompts, of an image's token
            self._rows = _embedding_rows(self._hf, self._model.trust_remote_code) or self._rows
            self._looked = True
        if self._rows and array.max() >= self._rows:
            beyond = int(array[array >= self._rows][0])
            if tokenizer is None:
                raise CorpusError(
                    f"document {document}: the {what} {beyond} of corpus.input_ids is beyond the "
                    f"embedding of {self._model.source}, which has {self._rows} rows, the last of "
                    f"id {self._rows - 1}; give ids of this model's own "
                    f"{'codec' if self._codebooks else 'tokenizer'}"
                )
            raise CorpusError(
                f"document {document}: token {tokenizer.convert_ids_to_tokens(beyond)!r} has the "
                f"id {beyond}, and the embedding of {self._model.source} has {self._rows} rows, "
                f"the last of id {self._rows - 1}; set model.tokenizer to a tokenizer of this "
                "model, or resize the embedding and save the model"
            )
        return array.astype("<i4")


def positions_of(codes: Sequence[Any], count: int, place: str) -> list[tuple[Any, ...]]:
    """The codes of each position of a document.

    Args:
        codes: of each codebook one for each frame, as a codec gives them: (codebooks, frames).
        count: the codebooks of the model.
        place: where they were read, for messages.

    Returns:
        (frames, codebooks).

    Raises:
        CorpusError: they are of another shape.

    Examples:
        >>> positions_of([[1, 2, 3], [4, 5, 6]], 2, "here")
        [(1, 4), (2, 5), (3, 6)]
    """
    found = ""
    if wrong := [one for one in codes if not isinstance(one, list | tuple)]:
        found = f"{kind(wrong[0])} for a codebook"
    elif len(lengths := {len(one) for one in codes}) > 1 or len(codes) not in (0, count):
        found = f"the shape [{len(codes)}, {' or '.join(map(str, sorted(lengths)))}]"
    if found:
        raise CorpusError(
            f"{place}: corpus.input_ids has {found}, and the model reads {count} codes a position; "
            f"give lists of integers [{count}, frames], of EnCodec audio_codes[0, 0]"
        )
    return list(zip(*codes, strict=True))


def _embedding_rows(config: "PretrainedConfig", trust_remote_code: bool) -> int | None:
    """The rows of the token embedding of the model that a config describes, built without weights;
    None where it cannot be built so, or embeds tokens without a table.
    """
    import torch

    from theloom.hooks.module_names import token_embedding
    from theloom.model.checkpoint.classes import auto_class
    from theloom.model.checkpoint.limits import bounded_build

    try:
        with bounded_build(), torch.device("meta"):
            model = auto_class(config, trust_remote_code).from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
        table: Any = token_embedding(model)
        weight: Any = getattr(table[0] if codebooks(config) else table, "weight", None)
    except Exception:  # a model's own code: loading it says what is wrong
        return None
    return len(weight) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
