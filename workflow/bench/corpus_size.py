"""`python workflow/bench/corpus_size.py`: memory and time of each stage, by the size of the corpus.

A tiny random Llama, one hook point. By tokens: documents of 1 to 999 token ids, some 500. By
documents: of two token ids each. Shards have the same number of tokens in each corpus, as the plan
of a run has, whose shards are ten minutes long: a larger corpus has more of them, up to 1,000. Each
stage is a process of its own; of the jobs that extract shards, the one with the highest peak is
shown, and the time of all.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of so small matrices

from theloom.config import compose, frozen
from theloom.config.sharding import MIN_SHARDS, groups
from theloom.devices import host
from theloom.terminal import table

ROOT = Path(__file__).parents[2]
PIECE = 1000  # documents that are written together
LONGEST = 999  # tokens of a document of the corpora by tokens
WIDTH = 16
HOOK = "blocks.0.hook_resid_post"


@dataclass(frozen=True)
class Corpus:
    """Documents of `n % longest + 1` tokens, in a mixed order; or all of two."""

    name: str
    documents: int
    longest: int | None = None

    @classmethod
    def of_tokens(cls, millions: str) -> "Corpus":
        """Some 500 tokens a document."""
        documents = round(float(millions) * 1e6 * 2 / (LONGEST + 1))
        return cls(f"{millions} M tokens, {documents:,} documents", documents, LONGEST)

    @classmethod
    def of_documents(cls, millions: str) -> "Corpus":
        """Of two tokens each."""
        return cls(f"{millions} M documents of two tokens", round(float(millions) * 1e6))

    def length(self, number: int) -> int:
        """Tokens of a document."""
        return 2 if self.longest is None else 1 + number * 7919 % self.longest

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(self.length, range(self.documents)))

    def write(self, path: Path) -> None:
        """Write it as token ids."""
        ids = [n * n % 251 for n in range(251 + LONGEST)]
        with path.open("w") as file:
            for first in range(0, self.documents, PIECE):
                numbers = range(first, min(first + PIECE, self.documents))
                texts = (json.dumps(ids[n % 251 :][: self.length(n)]) for n in numbers)
                file.writelines(f'{{"ids": {text}}}\n' for text in texts)


@dataclass(frozen=True)
class Seen:
    """What a stage took: seconds, those of the processor, MB at the peak, and MB before it."""

    seconds: float
    processor: float
    peak: float
    before: float


def tiny_model(folder: Path) -> Path:
    """A model's folder without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def extract(folder: Path, numbers: range, shards: int) -> Callable[[], None]:
    from theloom.engine import resident  # noqa: F401 - what the job imports when it begins
    from theloom.pipeline.extract_shard import extract_shards

    names = ("extract.json", "estimate.h5", "model.h5", "tokens.h5")
    outputs = {n: folder / f"shards/{n:05d}-of-{shards:05d}.h5" for n in numbers}
    return lambda: extract_shards(*(folder / name for name in names), outputs)


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
        assert acts[acts.hooks[0]][-1].shape == (WIDTH,)

    return work


def measured(prepare: Callable[..., Callable[[], None]], *arguments: Any) -> Seen:
    """What a stage takes in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, *arguments).result()


def _measure(prepare: Callable[..., Callable[[], None]], *arguments: Any) -> Seen:
    import torch  # noqa: F401 - of every stage but the merge

    host.reuse_freed_blocks()  # as the pipeline does for its jobs
    work = prepare(*arguments)
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    work()
    return Seen(time.perf_counter() - start, time.process_time() - used, _peak(), before)


def _peak() -> float:
    """MB, of this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3


def stages(folder: Path, shards: int, per_job: int) -> Iterator[tuple[str, Seen]]:
    """Each stage and what it took."""
    yield "estimate_memory", measured(estimate, folder)
    yield "tokenize_corpus", measured(tokenize, folder)
    yield "load_model", measured(load_model, folder)
    jobs = [measured(extract, folder, numbers, shards) for numbers in groups(shards, per_job)]
    highest = max(jobs, key=lambda seen: seen.peak)
    seconds, processor = sum(j.seconds for j in jobs), sum(j.processor for j in jobs)
    yield "extract_shard", Seen(seconds, processor, highest.peak, highest.before)
    yield "merge_shards", measured(merge, folder)
    yield "verify", measured(verify, folder)
    yield "theloom.open", measured(read, folder)


def requested() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python workflow/bench/corpus_size.py", description=__doc__
    )
    parser.add_argument("--tokens", default="1,10", help="millions, in a comma list")
    parser.add_argument("--documents", default="", help="of two tokens: millions, likewise")
    parser.add_argument("--shard-tokens", type=int, default=500_000, help="of a shard")
    parser.add_argument("--per-job", type=int, default=20, help="shards that one job extracts")
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    return parser.parse_args()


def run(corpus: Corpus, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Seen]]:
    """The stages over a corpus, of which the files are deleted after the last."""
    shards, path = max(MIN_SHARDS, corpus.tokens // options.shard_tokens), folder / "x.jsonl"
    corpus.write(path)
    frozen_run(folder / "run", tiny_model(folder / "model"), path, shards)
    yield from stages(folder / "run", shards, options.per_job)
    shutil.rmtree(folder / "run")


def main() -> None:
    """Print a table."""
    options = requested()
    by_tokens = [Corpus.of_tokens(n) for n in filter(None, options.tokens.split(","))]
    by_documents = [Corpus.of_documents(n) for n in filter(None, options.documents.split(","))]
    rows = []
    for corpora in (by_tokens, by_documents):
        smallest: dict[str, float] = {}
        for corpus in corpora:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                for stage, seen in run(corpus, options, Path(folder)):
                    first = smallest.setdefault(stage, seen.peak)
                    numbers = [f"{seen.seconds:.1f}", f"{seen.processor:.1f}", f"{seen.peak:,.0f}"]
                    numbers += [f"{seen.peak - seen.before:,.0f}", f"{seen.peak / first:.3f}"]
                    rows.append([corpus.name, stage, *numbers])
                    print(rows[-1], file=sys.stderr, flush=True)
    heads = ["corpus", "stage", "seconds", "of the processor", "peak MB", "more than before"]
    print(table(rows, [*heads, "of the smallest corpus"], range(2, 7)))


if __name__ == "__main__":
    main()
