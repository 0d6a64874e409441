"""Small model folders with a tokenizer of bytes, for tests that break or extend them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import theloom
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import Stages, build_tiny, plain_residuals, stages
from theloom.errors import ModelError
from theloom.planning import estimate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXTS = ["The quick brown fox", "a", "jumps over the lazy dog. " * 3]
VOCABULARY = 320


def byte_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a BOS, saved in a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A model with weights scaled by 1/√fan-in."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def llama(folder: Path, **numbers: Any) -> Path:
    """A tiny Llama of three blocks with a tokenizer of bytes."""
    build_tiny("llama", folder, **{"vocab_size": VOCABULARY, **numbers})
    byte_tokenizer(folder)
    return folder


def first_blocks(source: Path, folder: Path, count: int) -> Path:
    """The first blocks of a model in one file of weights, and what else its folder holds."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    with safe_open(source / "model.safetensors", "pt") as weights:
        kept = {}
        for name in weights.keys():  # noqa: SIM118  it is no dict
            number = re.search(r"layers\.(\d+)\.", name)
            if number is None or int(number[1]) < count:
                kept[name] = weights.get_tensor(name)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, num_hidden_layers=count)
    return folder


def corpus(folder: Path, texts: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "texts.jsonl"
    lines = (json.dumps({"text": text}) for text in texts or TEXTS)
    file.write_text("\n".join(lines) + "\n")
    return file


def run(folder: Path, source: Path, overrides: str = "", texts: list[str] | None = None) -> Stages:
    """The stages of a run of a model over a few texts."""
    path = corpus(folder / "texts", texts)
    return stages(folder / "run", source, f"corpus=text corpus.path={path} {overrides}")


def refusal(folder: Path, source: Path, overrides: str = "") -> str:
    """The one line by which the first stage refuses a model."""
    made = run(folder, source, overrides)
    with pytest.raises(ModelError) as caught:
        estimate.run_estimate(made.config("estimate"), made.folder / "estimate.h5")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def describe(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Set values in a JSON file of a folder; None takes one out."""
    file = folder / name
    merged = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))


def change_weights(folder: Path, change: Any) -> None:
    """Write the weights of a folder anew, changed in place by a function."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def errors_against_plain(made: Stages, source: Path) -> float:
    """The largest error of a finished run against plain transformers, as a share of the largest
    value.
    """
    acts, worst = theloom.open(made.activations), 0.0
    for number in range(len(acts.documents)):
        document = acts.document(number)
        expected = plain_residuals(source, document.input_ids.tolist())
        for hook in acts.hooks:
            error = (document[hook].float() - expected[hook]).abs().max()
            worst = max(worst, float(error / expected[hook].abs().max()))
    return worst
