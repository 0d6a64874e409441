"""What layerwise execution would get wrong is refused, with the reason."""

import pytest
import torch
from layerwise_support import build, shell_of
from theloom.engine.layerwise.skeleton import Shell
from theloom.errors import ModelError
from theloom.model.block_calls import BlockCache

REASONS = {
    "gemma3n_text": r"Gemma3nTextModel cannot be run layer by layer: "
    r".* no residual stream of its own: \[2, 2, 5, 64\]",
    "zamba2": "Zamba2Model cannot be run layer by layer: block 3 shares weights with block 1",
    "glm_moe_dsa": "GlmMoeDsaModel cannot be run layer by layer: "
    "block 1 takes more than the residual",
}


@pytest.mark.parametrize("model_type", REASONS)
def test_an_architecture_that_would_come_out_wrong_is_refused_by_name(tmp_path, model_type):
    folder = build(model_type, tmp_path)
    with pytest.raises(ModelError, match=REASONS[model_type]), shell_of(folder):
        pass


def test_arguments_that_depend_on_the_text_are_refused(tmp_path, monkeypatch):
    folder = build("llama", tmp_path)
    record = Shell.record

    def with_text(self, ids, *args):
        calls = record(self, ids, *args)
        calls[1].kwargs["tokens"] = ids.clone()
        return calls

    monkeypatch.setattr(Shell, "record", with_text)
    with pytest.raises(ModelError, match="block 1"), shell_of(folder):
        pass


def test_a_model_that_keeps_more_than_keys_and_values_is_not_streamed(tmp_path):
    with shell_of(build("mamba2", tmp_path)) as (shell, _):
        assert not shell.streams


def test_a_block_that_looks_at_another_s_cache_is_stopped(tmp_path):
    with shell_of(build("llama", tmp_path)) as (shell, _):
        cache = BlockCache(shell.model.config, 1)
        assert shell.streams
    values = torch.zeros(1, 2, 3, 16)
    cache.update(values, values, 1)
    assert cache.get_seq_length(1) == 3
    with pytest.raises(
        ModelError, match=r"block 1 looks at the KV cache of block 0.*execution=resident"
    ):
        cache.get_seq_length()
