"""`python workflow/bench/tokenization.py`: memory and time of the tokenisation of large corpora.

By tokens: texts of 500 tokens of one byte. Many: short documents, and what later stages take to
read their tables. Long: one file of long words, so that the corpus is large and its tokens are few.
Each job is a process of its own; `--jobs` shares the corpus among several, one after the other.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from theloom.config import compose, frozen
from theloom.config.schema import Config
from theloom.devices import host
from theloom.terminal import table

ROOT = Path(__file__).parents[2]
PIECE = 1000  # documents that are written together


def bytes_model(folder: Path) -> Path:
    """A model's folder without weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _saved(folder, raw)


def words_model(folder: Path) -> Path:
    """A model's folder without weights, whose tokens are words between blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(folder, raw)


def _saved(folder: Path, raw: Any) -> Path:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    LlamaConfig(vocab_size=256, max_position_embeddings=4096).save_pretrained(folder)
    return folder


def write_lines(path: Path, documents: int, text: Callable[[int], str]) -> None:
    """A .jsonl file."""
    with path.open("w") as file:
        for first in range(0, documents, PIECE):
            numbers = range(first, min(first + PIECE, documents))
            file.writelines(json.dumps({"text": text(n)}) + "\n" for n in numbers)


def write_parquet(path: Path, documents: int, text: Callable[[int], str]) -> None:
    """A .parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("text", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none") as writer:
        for first in range(0, documents, PIECE):
            numbers = range(first, min(first + PIECE, documents))
            writer.write_table(pa.table({"text": [text(n) for n in numbers]}, schema))


def config_of(model: Path, path: Path) -> Config:
    """The settings of the stage."""
    overrides = f"model.source={model} corpus=text corpus.path={path} corpus.max_tokens=null"
    (run,) = compose.runs(
        ROOT / "config", "custom", f"{overrides} extraction.shards=8 extraction.device=cpu"
    ).values()
    return frozen.to_config(run.stage("tokens")["config"])


def measured(work: Callable[..., None], *arguments: Any) -> tuple[float, ...]:
    """Seconds of a job, those of its processor, its peak in MB, and the peak before it: with the
    tokenizer loaded.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, work, *arguments).result()


def _measure(work: Callable[..., None], model: Path, path: Path, *more: Any) -> Any:
    from theloom.corpus.encoding import Encoder

    config = config_of(model, path)
    Encoder(config)
    import torch  # noqa: F401 - of the process that holds the tokenizer

    before, start, used = _peak(), time.perf_counter(), time.process_time()
    work(config, *more)
    return time.perf_counter() - start, time.process_time() - used, _peak(), before


def _peak() -> float:
    """MB, of this process alone: what `getrusage` has began before it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3


def one_job(config: Config, output: Path) -> None:
    from theloom.corpus.tokens import tokenize

    tokenize(config, output)


def a_part(config: Config, part: int, parts: int, output: Path) -> None:
    from theloom.corpus.in_parts.part import tokenize_part

    tokenize_part(config, part, parts, output)


def the_gather(config: Config, parts: list[Path], output: Path) -> None:
    from theloom.corpus.in_parts.gather import gather

    gather(config, parts, output)


def tokenized(name: str, model: Path, path: Path, jobs: int, output: Path) -> list[list[str]]:
    """The rows of the table of one corpus."""
    size = f"{path.stat().st_size / 1e9:.2f} GB"
    if jobs == 1:
        found = {"one job": measured(one_job, model, path, output)}
    else:
        parts = [output.parent / f"part{n}.h5" for n in range(jobs)]
        each = [measured(a_part, model, path, n, jobs, file) for n, file in enumerate(parts)]
        found = {f"the slowest of {jobs} parts": max(each)}
        found["their gather"] = measured(the_gather, model, path, parts, output)
        for file in parts:
            file.unlink()
    written = f"{output.stat().st_size / 1e9:.2f} GB"
    return [
        [
            name,
            size,
            job,
            f"{s:.1f}",
            f"{cpu:.1f}",
            f"{peak:,.0f}",
            f"{peak - before:,.0f}",
            written,
        ]
        for job, (s, cpu, peak, before) in found.items()
    ]


def reading(output: Path) -> str:
    """What later stages take to read the tables."""
    from theloom.corpus.tokens_file import reading

    words = []
    for name, work in {
        "sizes": lambda: reading.sizes(output),
        "lengths of windows": lambda: reading.window_lengths(output),
        "a shard's tokens": lambda: reading.read_job(output, 3),
    }.items():
        start = time.perf_counter()
        work()
        words.append(f"{name} {time.perf_counter() - start:.2f} s")
    return ", ".join(words)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python workflow/bench/tokenization.py", description=__doc__
    )
    parser.add_argument("--tokens", default="1,10", help="millions of tokens, in a comma list")
    parser.add_argument("--documents", type=int, default=100_000, help="short ones")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of one file")
    parser.add_argument("--formats", default="jsonl,parquet", help="of that file")
    parser.add_argument("--jobs", type=int, default=1, help="that share each corpus")
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    requested = parser.parse_args()
    host.reuse_freed_blocks()  # as the pipeline does for its jobs
    rows, words = [], []
    with tempfile.TemporaryDirectory(dir=requested.folder) as name:
        folder = Path(name)
        of_bytes, of_words = bytes_model(folder / "bytes"), words_model(folder / "words")
        path, output = folder / "x.jsonl", folder / "tokens.h5"

        def look(shown: str, model: Path, file: Path) -> None:
            rows.extend(tokenized(shown, model, file, requested.jobs, output))
            print(rows[-1], file=sys.stderr, flush=True)
            file.unlink()

        for millions in filter(None, requested.tokens.split(",")):
            count = int(float(millions) * 1e6) // 500
            write_lines(path, count, lambda n: f"{n:09} some words".ljust(500, "x"))
            look(f"{millions} M tokens, {count:,} documents", of_bytes, path)
            output.unlink()
        if requested.documents:
            write_lines(path, requested.documents, lambda n: f"{n:09} short")
            look(f"{requested.documents:,} short documents", of_bytes, path)
            words.append(reading(output))
            print(words, file=sys.stderr, flush=True)
        count = int(requested.gigabytes * 1e9) // 5010
        for kind in filter(None, requested.formats.split(",")) if count else ():
            file, write = folder / f"x.{kind}", write_lines if kind == "jsonl" else write_parquet
            write(file, count, lambda n: f"{n:0499} ".ljust(5000, "x"))
            look(f"one .{kind} of {count:,} documents", of_words, file)
    heads = ["corpus", "its size", "job", "seconds", "of the processor", "peak MB"]
    heads += ["more than before", "tokens.h5"]
    print(table(rows, heads, range(3, 8)))
    print("\n".join(words))


if __name__ == "__main__":
    main()
