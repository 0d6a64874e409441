"""A sample of the sweep over all architectures (`make sweep`): of each kind one."""

import pytest
import sweep
from theloom.hooks import blocks
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SAMPLE = {  # whether it is streamed
    "bamba": True,  # told its positions
    "bart": True,  # the decoder of two
    "gemma4_text": True,  # heads that differ from block to block
    "longcat_flash": True,  # fewer blocks than its config says
    "mamba": False,
    "qwen3_next": True,
    "roberta": True,
    "deepseek_v32": False,  # a top-k over keys
}


@pytest.mark.parametrize(("model_type", "streams"), SAMPLE.items())
def test_residuals_are_the_model_s_own_and_chunks_are_exact_or_refused(model_type, streams):
    (row,) = sweep.sweep([model_type])
    assert not row.problem
    assert not row.refusal
    assert row.parity
    assert row.streams is streams
    assert bool(row.tried.not_streamed) is not streams
    assert not row.silently_wrong
    assert row.shifted == (model_type == "mamba")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("cpmant", "not one row for each"),
        ("hy_v4", "not one row for each"),
        ("reformer", "its blocks are not one stream"),
        ("xlm", "cannot tell which modules are its 3 blocks"),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_reason(model_type, reason):
    (row,) = sweep.sweep([model_type])
    assert reason in row.refusal


def test_the_page_in_the_docs_is_of_these_architectures():
    page = sweep.DOCUMENT.read_text()
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert listed == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_an_encoder_decoder_s_blocks_are_those_that_run():
    model = sweep.build("bart")
    assert blocks.find_blocks(model).blocks == list(model.model.decoder.layers)
