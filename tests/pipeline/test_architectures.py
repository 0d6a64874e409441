"""A sample of the sweep over all architectures (`make sweep`): models of each kind go through the
stages, and every document's rows are those of plain transformers on that document alone.
"""

import pytest
import sweep
from support import stages
from theloom.errors import ModelError
from theloom.hooks import blocks
from transformers import CanineConfig, CanineModel

RIGHT = {  # whether it is streamed
    "causal/gemma3": True,  # its initialisation looks at values; a vision tower that is not loaded
    "causal/deepseek_v4": False,  # four residual streams; a key that transformers takes for another
    "causal/longcat_flash": True,  # a loop over the experts that have tokens
    "causal/cpmant": False,  # a prompt of its own before the tokens
    "causal/dbrx": True,  # a class more than it has experts
    "causal/emu3": True,  # the text half of a model, for whose config AutoModel has no class
    "causal/gemma3n_text": True,  # streams side by side, which are the first axis
    "causal/hrm_text": True,  # blocks that run several times in a pass
    "causal/jetmoe": True,  # counts the tokens of each expert
    "causal/xlnet": False,  # positions before windows
    "causal/zaya": True,  # reads the dtype of a norm that is not loaded
    "causal/zamba2": True,  # its code for a step of one token gives other rows
    "causal/deepseek_v32": False,  # keys by a score, so that padding changes rows
    "image-text/paligemma": False,  # sees both ways: padding and masks change rows
    "encoder-decoder/encoder-decoder": False,  # two models in one, each of its own class
    "encoder-decoder/fsmt": False,  # its output embeddings are its decoder's
    "masked/albert": False,  # one module, as many blocks as its config says
    "masked/longformer": False,  # decides by the values of its mask, and pads to whole windows
    "masked/modernbert": False,
    "base/aimv2_vision_model": False,  # positions of one size of image
    "base/hiera": False,  # input and output of one module are two of its stages
    "base/moonshine": False,  # raw sound, by convolutions of its encoder; the decoder is not loaded
    "base/qwen2_audio_encoder": False,  # its own last state is pooled
}


@pytest.mark.parametrize(("name", "streams"), RIGHT.items())
def test_rows_of_every_document_are_those_of_it_alone(tmp_path, name, streams):
    ((kind, model_type, model_class),) = sweep.names([name])
    row = sweep.examine(kind, model_type, model_class, tmp_path)
    assert row.status == "right", row.reason
    assert row.streams is streams
    assert bool(row.not_streamed) is not streams


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("base/vits", "", "its code decides by the values of tensors"),
        ("base/bros", "", "its memory cannot be predicted"),
        ("masked/squeezebert", "", "is unavailable from this model"),
        ("causal/mamba", "memory.quantization=8bit", "its memory cannot be predicted"),
        ("masked/funnel", "", "cannot tell which modules are its 12 blocks"),
        ("image-text/blip", "", "are read behind an image alone"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(tmp_path, name, overrides, reason):
    kind, _, model_type = name.partition("/")
    sweep.build(model_type, kind).save_pretrained(tmp_path / "model")
    run = stages(tmp_path / "run", tmp_path / "model", f"corpus.context_length=40 {overrides}")
    with pytest.raises(Exception, match=reason) as refusal:
        run.prepare()
    assert "\n" not in str(refusal.value)
    assert "aten" not in str(refusal.value)


def test_a_model_without_a_vocabulary_is_refused_in_one_line(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CanineModel(CanineConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="no num_hidden_layers, hidden_size or vocab_size"):
        stages(tmp_path / "run", tmp_path / "model").prepare()


def test_the_page_in_the_docs_is_of_these_architectures():
    page = sweep.DOCUMENT.read_text()
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert listed == [model_type for _, model_type, _ in sweep.names()]


def test_an_encoder_decoder_s_blocks_are_those_that_run():
    model = sweep.build("bart")
    assert blocks.find_blocks(model).blocks == list(model.model.decoder.layers)
