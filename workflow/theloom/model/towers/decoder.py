"""Decoders of texts behind an encoder of audio: Whisper and its kind.

Such a model takes `input_ids` and `attention_mask` of the target's tokens, and the inputs of the
encoder by their names, but for the encoder's mask, which is `source_mask`. Where it is given none
of these it makes inputs of its own, so that all that tries, traces and measures a model on token
ids does the same with it.
"""

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from theloom.config.model_dims import mark_side, numbers
from theloom.errors import ModelError
from theloom.model.checkpoint.halves import SOURCE_MASK, remade
from theloom.model.towers.trial_inputs import trial_inputs
from theloom.rows.modality import mark_source, source_of
from theloom.rows.tower_inputs import Sample, samples_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_MASK = "attention_mask"  # what transformers calls the encoder's
_TARGET = ("decoder_input_ids", "decoder_attention_mask")


def has_decoder(whole: Any) -> bool:
    """Whether a class is one of an encoder-decoder that writes texts and reads none.

    Args:
        whole: of transformers.

    Returns:
        True by the arguments of its forward.
    """
    takes = signature(whole.forward).parameters
    return all(name in takes for name in _TARGET) and "input_ids" not in takes


@cache
def decoder(whole: Any, main: str, source: str, samples: tuple[Sample, ...] = ()) -> Any:
    """The class of a decoder behind an encoder of audio.

    Args:
        whole: the class of transformers, without a head.
        main: the name of its main input.
        source: what the encoder reads: `audio`.
        samples: of its input, where its processor is known (`samples_of`).

    Returns:
        A class with the names of weights of the whole one.
    """

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        mark_source(self.config, source, samples)
        mark_side(self.config, "decoder")
        if not all(hasattr(self, name) for name in ("encoder", "decoder")):
            raise ModelError(
                f"{whole.__name__} keeps its decoder where TheLoom does not know it: its hook "
                "points cannot be read"
            )

    made = remade(whole, build, _forward(whole, main))
    made.main_input_name = main
    return made


def _forward(whole: Any, main: str) -> Any:
    # such a class makes a mask of its own of the sums of one, which have no values in a trace
    made_anew = hasattr(whole, "_get_feature_vector_attention_mask")

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        source_mask: Any = None,
        source_rows: int = 0,
        use_cache: Any = None,
        **given: Any,
    ) -> Any:
        if main not in given:
            given |= own_inputs(self, len(input_ids), source_rows)
        elif source_mask is not None:
            given[_MASK] = source_mask
        if made_anew and _MASK in given and bool(given[_MASK].all()):
            del given[_MASK]  # one of ones says as much as none
        given[main] = given[main].to(self.dtype)
        return whole.forward(
            self,
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            use_cache=False,
            **given,
        )

    return forward


def own_inputs(model: "PreTrainedModel", windows: int, rows: int) -> "dict[str, torch.Tensor]":
    """Inputs of the encoder that stand for any document, the same in each window.

    Args:
        model: of a decoder behind an encoder of audio, real or fake.
        windows: how many side by side.
        rows: that the encoder shall make of each, at least; 0: as many as a short clip has.

    Returns:
        By name in the forward of transformers' class. A processor that pads clips does so here.
    """
    found = trial_inputs(model, windows, rows)
    main = found[model.main_input_name]
    main[1:].copy_(main[:1])  # a window by itself is given what it is given beside others
    for part in next(iter(samples_of(model.config)), ()):
        if part.masks and part.values is not None and not all(part.values):
            mask = found[part.name]
            mask[..., -max(1, mask.shape[-1] // 16) :] = 0
    return found


def given_inputs(inputs: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """What the processor makes, by the names that a decoder's forward has for it.

    Args:
        inputs: by the names of transformers' class.

    Returns:
        The same tensors.
    """
    return {SOURCE_MASK if name == _MASK else name: value for name, value in inputs.items()}


def longest_target(config: "PretrainedConfig") -> int:
    """Tokens that a decoder behind an encoder of audio takes at most.

    Args:
        config: of a model.

    Returns:
        Their number; 0: there is no limit, or the model is of another kind.
    """
    return numbers(config).context_length if source_of(config) else 0
