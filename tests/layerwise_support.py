"""What the tests of layerwise execution share: the rows of both modes, and tiny models of harder
architectures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from support import Stages, a_config, build_tiny
from theloom.engine.layerwise import residual_store, shard
from theloom.engine.layerwise.block_loader import BlockSource
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.engine.layerwise.skeleton import Shell, examine
from theloom.engine.resident import ResidentRunner
from theloom.hooks.points import HookPoint
from theloom.model import files, loading
from theloom.model.loading import LoadedModel
from theloom.precision import torch_dtype
from theloom.store import writer

LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
}
HARDER = {
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    # refused
    "gemma3n_text": {
        "head_dim": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
        "chunk_size": 8,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "num_key_value_heads": 4,
    },
    "glm_moe_dsa": {
        **LATENT,
        **EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
}

KEPT_EVERY = 2  # blocks between the checkpoints of a job that a test kills

Rows = dict[tuple[int, str], dict[int, torch.Tensor]]


def build(model_type: str, folder: Path) -> Path:
    """A tiny model of any of the architectures."""
    return build_tiny(model_type, folder, **HARDER.get(model_type, {}))


def load(folder: Path, precision: str = "fp32") -> LoadedModel:
    """The model, resident."""
    config = a_config(folder, f"memory.precision_mode={precision}")
    return loading.load_model(config, files.prepare_files(config.model))


@contextmanager
def shell_of(
    folder: Path, precision: str = "fp32", device: str = "cpu"
) -> Iterator[tuple[Shell, BlockSource]]:
    """The model's shell, examined, and the source of its blocks."""
    config = a_config(folder)
    shell = Shell(folder, files.hf_config(config.model), precision, torch.device(device))
    with BlockSource(shell.checkpoint, shell.device, len(shell.blocks)) as blocks:
        examine(shell, blocks)
        yield shell, blocks


def keeper(rows: Rows):
    """A sink that keeps what it is given, by batch and hook point, at its position; windows in
    their order.
    """

    def keep(batch: int, name: str, start: int, values: torch.Tensor, first: int = 0) -> None:
        kept = rows.setdefault((batch, name), {})
        values = values.to("cpu", copy=True)
        kept[start] = torch.cat([kept[start], values]) if first else values

    return keep


def resident_rows(
    loaded: LoadedModel,
    points: Sequence[HookPoint],
    batches: Sequence[torch.Tensor],
    chunk_size: int,
) -> Rows:
    rows: Rows = {}
    keep = keeper(rows)
    runner = ResidentRunner(loaded, list(points), chunk_size, loaded.precision.resolved)
    for number, ids in enumerate(batches):
        runner.run(ids, lambda *args, number=number: keep(number, *args))
    return rows


def layerwise_rows(
    folder: Path,
    points: Sequence[HookPoint],
    batches: Sequence[torch.Tensor],
    chunk_size: int,
    precision: str = "fp32",
    spilled: Path | None = None,
    device: str = "cpu",
    groups: int = 1,
) -> Rows:
    rows: Rows = {}
    with shell_of(folder, precision, device) as (shell, blocks):
        runner = LayerwiseRunner(shell, blocks, points, chunk_size, precision, groups)
        store = ResidualStore(
            runner.residuals(batches, "test"),
            spilled,
            spilled=spilled is not None,
            device=shell.device,
        )
        with store:
            runner.sweep(batches, store, keeper(rows))
    assert all(p.is_meta for block in shell.blocks for p in block.parameters())
    assert all(rows[key][0].dtype == torch_dtype(precision) for key in rows)
    return rows


def assert_equal(found: Rows, expected: Rows) -> None:
    """The same rows, bit for bit, in the same pieces."""
    assert found.keys() == expected.keys()
    for key, chunks in expected.items():
        assert found[key].keys() == chunks.keys(), key
        for start, values in chunks.items():
            assert torch.equal(found[key][start], values), (key, start)


def some_batches(vocabulary: int = 128) -> list[torch.Tensor]:
    """Long documents, alone and two side by side, with last chunks of one token and of three, and
    short ones.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 64), (2, 31), (3, 7), (2, 7), (1, 1)]
    return [torch.randint(3, vocabulary, shape, generator=generator) for shape in shapes]


def extract_with_small_commits(folder: Path, spilled: bool) -> None:
    """The extraction of a layerwise run, committed every 16 KiB: the body of a job that a test
    kills.
    """
    torch.set_num_threads(1)
    writer.COMMIT_BYTES = 1 << 14
    residual_store.BLOCKS_BETWEEN_CHECKPOINTS = KEPT_EVERY
    if spilled:
        plan = shard._plan
        shard._plan = lambda *args: replace(plan(*args), spilled=True)
    Stages(folder).extract()
