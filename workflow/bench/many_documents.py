"""`python workflow/bench/many_documents.py`: memory of each stage of a run of very many documents.

A tiny random Llama over documents of two token ids each, one hook point. Each stage is a process of
its own; of the shards, each is extracted by a job of its own, and the slowest is told.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from theloom.config import compose, frozen
from theloom.devices import host
from theloom.terminal import table

ROOT = Path(__file__).parents[2]
PIECE = 1000  # documents that are written together
HOOK = "blocks.1.hook_resid_post"


def tiny_model(folder: Path) -> Path:
    """A model's folder without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_corpus(path: Path, documents: int) -> None:
    """Documents of two token ids."""
    with path.open("w") as file:
        for first in range(0, documents, PIECE):
            numbers = range(first, min(first + PIECE, documents))
            file.writelines(json.dumps({"ids": [n % 251, n % 241]}) + "\n" for n in numbers)


def frozen_run(folder: Path, model: Path, corpus: Path, shards: int) -> None:
    """Write the frozen configs of the stages."""
    overrides = (
        f"model.source={model} corpus=text corpus.path={corpus} corpus.input_ids=ids "
        f"corpus.max_tokens=null extraction.shards={shards} extraction.device=cpu "
        f"memory.activation_cache_filter=[{HOOK}] verify.documents=4"
    )
    (run,) = compose.runs(ROOT / "config", "custom", overrides).values()
    (folder / "shards").mkdir(parents=True)
    for stage in frozen.STAGES:
        frozen.freeze(run.stage(stage), folder / f"{stage}.json")


def estimate(folder: Path) -> Callable[[], None]:
    from theloom.planning.estimate import run_estimate

    config = frozen.load_frozen(folder / "estimate.json")
    return lambda: run_estimate(config, folder / "estimate.h5")


def tokenize(folder: Path) -> Callable[[], None]:
    from theloom.corpus import tokens

    config = frozen.load_frozen(folder / "tokens.json")
    return lambda: tokens.tokenize(config, folder / "tokens.h5")


def load_model(folder: Path) -> Callable[[], None]:
    from theloom.pipeline.load_model import record

    config = frozen.load_frozen(folder / "model.json")
    files = (folder / name for name in ("estimate.h5", "tokens.h5", "model.h5"))
    return lambda: record(config, *files)


def extract(folder: Path, number: int, shards: int) -> Callable[[], None]:
    from theloom.engine import resident  # noqa: F401 - what the job imports when it begins
    from theloom.pipeline.extract_shard import extract_shard

    names = ("extract.json", "estimate.h5", "model.h5", "tokens.h5")
    output = folder / f"shards/{number:05d}-of-{shards:05d}.h5"
    return lambda: extract_shard(*(folder / name for name in names), number, output)


def merge(folder: Path) -> Callable[[], None]:
    from theloom.dataset.merge import merge_shards

    shards = sorted(folder.glob("shards/*.h5"))
    return lambda: merge_shards(shards, "virtual", folder / "activations.h5")


def verify(folder: Path) -> Callable[[], None]:
    from theloom.verification.verify import verify_run

    config = frozen.load_frozen(folder / "verify.json")
    files = (folder / name for name in ("activations.h5", "model.h5", "verification.h5"))
    return lambda: verify_run(config, *files)


def read(folder: Path) -> Callable[[], None]:
    import theloom

    def work() -> None:
        acts = theloom.open(folder / "activations.h5")
        assert acts[acts.hooks[0]][-1].shape == (32,)

    return work


def measured(prepare: Callable[..., Callable[[], None]], *arguments: Any) -> tuple[float, ...]:
    """Seconds of a stage, those of its processor, its peak in MB and what it had before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, *arguments).result()


def _measure(prepare: Callable[..., Callable[[], None]], *arguments: Any) -> tuple[float, ...]:
    import torch  # noqa: F401 - of every stage but the merge

    host.reuse_freed_blocks()  # as the pipeline does for its jobs
    work = prepare(*arguments)
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used, _peak(), before


def _peak() -> float:
    """MB, of this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3


def stages(folder: Path, shards: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Each stage and what it took."""
    yield "estimate_memory", measured(estimate, folder)
    yield "tokenize_corpus", measured(tokenize, folder)
    yield "load_model", measured(load_model, folder)
    found = [measured(extract, folder, number, shards) for number in range(shards)]
    yield f"extract_shard, 1 of {shards}", max(found, key=lambda seen: seen[2])
    yield "merge_shards", measured(merge, folder)
    yield "verify", measured(verify, folder)
    yield "theloom.open", measured(read, folder)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python workflow/bench/many_documents.py", description=__doc__
    )
    parser.add_argument("--documents", default="1", help="millions, in a comma list")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    requested = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=requested.folder) as name:
        model = tiny_model(Path(name) / "model")
        for millions in requested.documents.split(","):
            count, corpus = int(float(millions) * 1e6), Path(name) / "x.jsonl"
            folder = Path(name) / f"run-{millions}"
            write_corpus(corpus, count)
            frozen_run(folder, model, corpus, requested.shards)
            for stage, (seconds, used, peak, before) in stages(folder, requested.shards):
                more = f"{peak - before:,.0f}"
                rows.append([f"{count:,}", stage, f"{seconds:.1f}", f"{used:.1f}", f"{peak:,.0f}"])
                rows[-1].append(more)
                print(rows[-1], file=sys.stderr, flush=True)
    heads = ["documents", "stage", "seconds", "of the processor", "peak MB", "more than before"]
    print(table(rows, heads, range(2, 6)))


if __name__ == "__main__":
    main()
