"""A model several times the memory that a process may have: resident is refused beforehand, block
by block it runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast


def build_large(folder: Path, hidden: int, blocks: int) -> int:
    """A random Llama on disk, one file a block, made without ever being whole in memory; bytes of
    its weights.
    """
    folder.mkdir(parents=True)
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=256,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(letters, []))  # a byte is a token
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    generator, index, total = torch.Generator().manual_seed(0), {}, 0

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).uniform_(-1, 1, generator=generator) * columns**-0.5

    def save(tensors: dict[str, torch.Tensor], name: str) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * 4 for t in tensors.values())

    for block in range(blocks):
        shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
        shapes |= {"mlp.gate_proj": (4 * hidden, hidden), "mlp.up_proj": (4 * hidden, hidden)}
        shapes |= {"mlp.down_proj": (hidden, 4 * hidden)}
        tensors = {
            f"model.layers.{block}.{name}.weight": weight(*shape) for name, shape in shapes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(hidden)
        total += save(tensors, f"model-{block:05d}.safetensors")
    rest = {
        "model.embed_tokens.weight": weight(256, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    total += save(rest, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def limited(
    folder: Path, model: Path, limit: int, cgroup: Path | None = None, requested: str = ""
) -> dict:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "limited_run.py"),
        folder,
        model,
        limit,
    ]
    environment = os.environ | {
        "REQUESTED": requested,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_ARENA_MAX": "1",
    }
    words = [str(part) for part in [*command, *([cgroup] if cgroup else [])]]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_model_four_times_the_available_memory_is_extracted_and_verified(tmp_path):
    limit = 270_000_000
    weights = build_large(tmp_path / "model", hidden=768, blocks=29)
    assert weights >= 4 * limit
    requested = "corpus.max_tokens=160 corpus.context_length=128 verify.documents=1"
    found = limited(tmp_path, tmp_path / "model", limit, requested=requested)
    assert "the run needs at least 1." in found["refused"]
    assert "limited by ulimit -v" in found["refused"]
    assert found["error"] <= 1e-5


@pytest.mark.skipif(
    "THELOOM_LARGE" not in os.environ, reason="set THELOOM_LARGE=1 (3 GB of disk, root, cgroup v1)"
)
def test_a_model_of_four_times_a_cgroup_s_limit_is_extracted_and_verified(tmp_path):
    limit = 750_000_000
    weights = build_large(tmp_path / "model", hidden=1280, blocks=29)
    assert weights >= 4 * limit
    cgroup = Path("/sys/fs/cgroup/memory/theloom-test")
    cgroup.mkdir(exist_ok=True)
    try:
        (cgroup / "memory.limit_in_bytes").write_text(str(limit))
        requested = "corpus.max_tokens=1500 corpus.context_length=200 verify.documents=1"
        found = limited(tmp_path, tmp_path / "model", limit, cgroup, requested)
        print(weights, found)
    finally:
        cgroup.rmdir()
    assert "limited by the cgroup" in found["refused"]
    assert found["error"] <= 1e-5
