"""Steps of `make gpu`: a random Llama as large as the GPU holds, on one and over several."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_machine import Rows, SkippedError, device, gpu, idle, is_real, seconds
from gpu_runs import DIFFERENCE, FP32, extracted, tiny
from gpu_schedule import in_turn, together
from simulated_runs import difference, read_rows
from theloom.devices import accelerator, gpu_lease, pinned, streams
from theloom.devices.workspace import cublas_workspace
from theloom.hooks.blocks import Architecture, find_blocks
from theloom.hooks.points import residual_points
from theloom.hooks.taps import Taps
from theloom.memory import replayed
from theloom.memory.estimators import Traced
from theloom.memory.sizes import Workload
from theloom.model import device_map
from theloom.model.forward import prefill
from theloom.model.weight_format import WeightFormat
from transformers import AutoModel, LlamaConfig

# hidden size, blocks, intermediate size, heads, heads of keys; by bytes in BF16
LLAMAS = {
    "8B": (4096, 32, 14336, 32, 8),
    "3B": (3072, 28, 8192, 24, 8),
    "1B": (2048, 16, 8192, 32, 8),
    "100M": (768, 12, 3072, 12, 4),
    "1M": (128, 4, 512, 4, 2),
}


def llama(folder: Path) -> Rows:
    """A random Llama: memory predicted and measured, tokens/s, and MFU: FLOP/s of its blocks over
    the measured rate of a product of the same size and dtype.
    """
    here, dtype = device(), torch.bfloat16
    name = _largest(here)
    windows, tokens = (8, 1024) if name != "1M" else (2, 128)
    row: dict[str, Any] = {"Llama": name, "windows": windows, "tokens of each": tokens}
    traced, kind = Traced(_config(name)), WeightFormat("bf16")
    workload = Workload(windows, tokens, tokens)
    workspace = cublas_workspace(accelerator.capability(here)) if is_real(here) else 0
    parts = traced.forward(kind, workload, [], device=here.type)
    predicted = traced.weights(kind) + parts.total + workspace
    with torch.device(here):
        model = AutoModel.from_config(_config(name), dtype=dtype).eval().requires_grad_(False)
    ids = torch.randint(0, 32000, (windows, tokens)).to(here)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    if here.type != "cpu":
        accelerator.empty_cache(here)
        accelerator.reset_peak(here)
    taken = seconds(here, forward)
    if here.type != "cpu":
        peak, reserved = accelerator.peak(here), accelerator.peak_reserved(here)
        held = replayed.resident(
            traced.fake(kind),
            [workload],
            [],
            kind.precision,
            fixed=[workspace],
            expandable=accelerator.expandable_segments(here),
        )
        row["allocated MB"], row["predicted MB"] = peak / 1e6, predicted / 1e6
        row["predicted / allocated"] = predicted / peak
        row["reserved MB"], row["predicted reserved MB"] = reserved / 1e6, held.reserved / 1e6
    hidden, _, inner, *_ = LLAMAS[name]
    rate = _matmul_rate(here, dtype, windows * tokens, hidden, inner)
    flops = 2 * _parameters(name) * windows * tokens + _attention_flops(name, windows, tokens)
    row |= {
        "tokens/s": windows * tokens / taken,
        "TFLOP/s": flops / taken / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "MFU %": 100 * flops / taken / rate,
    }
    if is_real(here) and accelerator.has_streams(here):
        row["idle %"] = idle(here, forward)
    return [row]


def several_gpus(folder: Path) -> Rows:
    """One model over all GPUs: rows against the CPU's, then a random Llama's tokens/s with all GPUs
    at work and with one after the other, next to the gain that the schedule simulator predicts from
    each GPU's seconds.
    """
    here = gpu("several GPUs")
    count = accelerator.count(here.type)
    if count < 2:
        raise SkippedError("several GPUs for one model: this machine has one")
    model_folder = tiny(folder)
    expected = read_rows(extracted(folder / "cpu", model_folder, "fp32", "cpu"))
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    environment = {"SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": names}  # as a scheduler gives them
    with mock.patch.dict(os.environ, environment), gpu_lease.gpus(count, device=here.type):
        found = read_rows(extracted(folder / "gpus", model_folder, "fp32", here.type))
    off = difference(found, expected)
    name, gpus = _largest(here), [torch.device(here.type, number) for number in range(count)]
    windows, tokens, batches = (2, 1024, 32) if is_real(here) else (2, 128, 4)
    model = _over(name, gpus)
    ids = torch.randint(0, 32000, (windows, tokens))
    forward, parts, alone = _passes(model, gpus, ids)
    taken = {}
    for how in ("in turn", "together"):
        began = time.perf_counter()
        for _ in range(batches):
            forward()
            if how == "in turn":
                _all_done(gpus)
        _all_done(gpus)
        taken[how] = time.perf_counter() - began
    copy = max(0.0, alone - sum(parts)) / (count - 1)
    predicted = together(parts, batches, copy)
    rates = {f"tokens/s {how}": batches * ids.numel() / s for how, s in taken.items()}
    return [
        {"GPUs": count, "Llama": name, DIFFERENCE: off, "right": off <= FP32}
        | rates
        | {
            "gain": taken["in turn"] / taken["together"],
            "gain predicted": in_turn(parts, batches, copy).seconds / predicted.seconds,
            "bubble predicted %": 100 * predicted.bubble,
            "copy ms": 1000 * copy,
        }
    ]


def _largest(here: torch.device) -> str:
    """The largest Llama that leaves a GPU 40% of its free memory; the smallest where time counts
    for nothing.
    """
    free = accelerator.driver_memory(here)[0] if is_real(here) else 0
    return next(n for n in LLAMAS if _parameters(n) * 2 < 0.6 * free or n == "1M")


def _config(name: str) -> LlamaConfig:
    hidden, blocks, inner, heads, key_heads = LLAMAS[name]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
    )


def _over(name: str, gpus: list[torch.device]) -> Architecture:
    """A random Llama cut to GPUs of equal size, as `load_model` places one."""
    with torch.device(gpus[0]):
        model = AutoModel.from_config(_config(name), dtype=torch.bfloat16).eval()
    described = find_blocks(model.requires_grad_(False))
    equal = [4 * _parameters(name) + (1 << 30)] * len(gpus)
    cut = device_map.cut_to(described, WeightFormat("bf16"), equal, [None] * len(gpus))
    places = {module: gpus[number] for module, number in cut.items()}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module, one in places.items():
            model.get_submodule(module).to(one)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    device_map.keep_all_busy(model, places)
    return described


def _passes(
    described: Architecture, gpus: list[torch.device], ids: torch.Tensor
) -> tuple[Callable[[], None], list[float], float]:
    """A pass to the last block, each GPU's seconds of one, and those of it all."""
    point = residual_points(len(described.blocks), described.hidden_size)[-1]
    begun: dict[torch.device, streams.Mark] = {}

    def begin(block: Any, _: Any) -> None:
        here = next(block.parameters()).device
        if here not in begun:
            begun[here] = streams.mark(here, timing=True)

    def forward() -> None:
        with Taps(described, [point], lambda name, value: None) as taps:
            prefill(taps, pinned.pinned_copy(ids, gpus[0]), ids.shape[1])

    forward()
    _all_done(gpus)
    hooks = [block.register_forward_pre_hook(begin) for block in described.blocks]
    began = time.perf_counter()
    forward()
    ends = [streams.mark(one, timing=True) for one in gpus]
    _all_done(gpus)
    taken = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    parts = [max(1e-9, begun[g].seconds_to(end)) for g, end in zip(gpus, ends, strict=True)]
    return forward, parts, taken


def _all_done(gpus: list[torch.device]) -> None:
    for one in gpus:
        accelerator.synchronize(one)


def _parameters(name: str) -> int:
    """Of the blocks."""
    hidden, blocks, inner, heads, key_heads = LLAMAS[name]
    return blocks * int(2 * hidden * hidden * (1 + key_heads / heads) + 3 * hidden * inner)


def _attention_flops(name: str, windows: int, tokens: int) -> float:
    """Of scores and their product with the values, half of them masked."""
    hidden, blocks, *_ = LLAMAS[name]
    return 2 * blocks * windows * tokens * tokens * hidden


def _matmul_rate(here: torch.device, dtype: torch.dtype, rows: int, inner: int, out: int) -> float:
    """FLOP/s of one product."""
    x = torch.randn(rows, inner, device=here, dtype=dtype)
    w = torch.randn(inner, out, device=here, dtype=dtype)
    return 2 * rows * inner * out / seconds(here, lambda: x @ w)
