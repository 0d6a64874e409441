"""Random corpora, expressions, pools, shards, chunks and kills: every stored row is that of its
tokens, and has the token, the id and the label of its own document.

The model is a table of states by token and position, so that a thousand jobs take seconds; all
else is the pipeline's own, from the texts to the finished files.
"""

import copy
import csv
import gzip
import itertools
import json
import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import build_tiny, stages, with_bytes
from theloom.config.schema import Pool
from theloom.corpus import batching, tokens
from theloom.corpus.tokens_file import reading
from theloom.devices.peak_memory import MemoryWatch
from theloom.engine.batch_loop import Work, run_batches
from theloom.engine.selection import Selection
from theloom.errors import MemoryPlanError
from theloom.hooks.points import HookPoint, residual_points
from theloom.memory.profile import ShardProfile
from theloom.model.forward import spans
from theloom.planning.plan import Plan
from theloom.store import writer
from theloom.store.shard_file import ShardSpec
from theloom.store.writer import ShardWriter
from tokenizers import pre_tokenizers

KILLS = 6  # of a shard at most
EXAMPLES = int(os.environ.get("THELOOM_EXAMPLES", "30"))
CPU = torch.device("cpu")
WIDTH, CONTEXT = 4, 16
POINTS = residual_points(1, WIDTH)
STATES = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))


# the ids of a byte-level tokenizer: the places of its alphabet in order
ID = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
# what stands in that alphabet for each byte: itself where it can be printed, else one from 256 on
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
SHOWN = {b: chr(b) for b in PRINTED}
SHOWN |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in SHOWN)}


class Table:
    """Runs token ids (window, position): a state is the token's, plus its position and its block.
    It is killed at a pass of a given number.
    """

    def __init__(self, chunk_size, killed_at):
        self.chunk_size, self.left = chunk_size, killed_at

    def run(self, ids, sink, captured=None, lengths=None, windows=()):
        self.left -= 1
        for number, point in enumerate(POINTS):
            for start, end in spans(ids.shape[1], self.chunk_size):
                sink(point.name, start, states(ids, number)[:, start:end])
            if self.left == 0:  # with half of the batch handed over
                raise KeyboardInterrupt

    def alone(self, ids, points, window):
        return {p.name: states(ids, POINTS.index(p))[0] for p in points}


def states(ids, number):
    return STATES[ids] * (1 + torch.arange(ids.shape[1])[:, None]) + number


def an_expression(choose, depth=3):
    """A random expression, and the tokens of a text that it keeps: of the text, and of its tokens
    as letters.
    """
    if depth and choose.random() < 0.6:
        left, of_left = an_expression(choose, depth - 1)
        if choose.random() < 0.3:
            return f"~({left})", lambda text, own: {*range(len(own))} - of_left(text, own)
        right, of_right = an_expression(choose, depth - 1)
        if choose.random() < 0.5:
            return (
                f"({left}) & ({right})",
                lambda text, own: of_left(text, own) & of_right(text, own),
            )
        return f"({left})|({right})", lambda text, own: of_left(text, own) | of_right(text, own)
    a, b = choose.randint(-6, 6), choose.choice([None, *range(-6, 7)])
    n = choose.randint(1, 5)
    return choose.choice(
        [
            ("all", lambda _, own: {*range(len(own))}),
            ("first", lambda _, own: {0}),
            (f"last({n})", lambda _, own: {*range(len(own))[-n:]}),
            (f"[{a}:{'' if b is None else b}]", lambda _, own: {*range(len(own))[a:b]}),
            ("match('a')", lambda text, _: of_letter(text, "a")),
            ("match('文')", lambda text, _: of_letter(text, "文")),
        ]
    )


def of_letter(text, letter):
    """The numbers of the bytes of a letter in a text, whose tokens are bytes."""
    ends = np.cumsum([len(c.encode()) for c in text])
    return {
        n
        for c, end in zip(text, ends, strict=True)
        for n in range(end - len(c.encode()), end)
        if c == letter
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_bytes(build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=256))


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["key", "text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


FORMATS = {
    ".jsonl": write_lines,
    ".json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    ".csv": write_csv,
    ".tsv": lambda path, rows: write_csv(path, rows, "\t"),
    ".parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    ".arrow": lambda path, rows: pa.feather.write_feather(
        pa.Table.from_pylist(rows), path, compression="uncompressed"
    ),
}
PACKED = {".gz": gzip.compress, ".zst": zstandard.compress}


def a_corpus(folder, choose):
    """A random file of documents, some of them empty or null; the rows as they stand in it."""
    alphabet = choose.choice(["abc", "ab cß文"])
    texts = ["abcabc" * 6]
    for _ in range(choose.randint(0, 8)):
        unit = "".join(choose.choice(alphabet) for _ in range(choose.randint(1, 3)))
        texts.append((unit * 40)[: choose.choice([1, 3, 15, 16, 17, 40])])
    texts += [choose.choice(["", None]) for _ in range(choose.randint(0, 3))]
    choose.shuffle(texts)
    keys = [f"{name}{n}" for n, name in enumerate(choose.choices("aß文 😀", k=len(texts)))]
    choose.shuffle(keys)
    rows = [
        {"key": key.strip(), "text": text, "label": choose.randint(-9, 9)}
        for key, text in zip(keys, texts, strict=True)
    ]
    suffix = choose.choice([*FORMATS])
    path = folder / f"corpus{suffix}"
    FORMATS[suffix](path, rows)
    if (packing := choose.choice(["", "", *PACKED])) and suffix not in (".parquet", ".arrow"):
        path.with_name(path.name + packing).write_bytes(PACKED[packing](path.read_bytes()))
        path.unlink()
    return rows


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    """The settings of the stage that tokenises, which a test changes."""
    corpus = "corpus=text corpus.path=. corpus.id_column=key corpus.columns=[label]"
    requested = f"{corpus} corpus.context_length={CONTEXT}"
    return stages(tmp_path_factory.mktemp("run"), model, requested).config("tokens")


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)
@given(choose=st.randoms(use_true_random=False))
def test_every_stored_row_is_that_of_its_tokens(choose, config, monkeypatch):
    """THELOOM_EXAMPLES: how many corpora are tried."""
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), choose, config)


def check(folder, choose, config):
    (folder / "texts").mkdir()
    rows = [row for row in a_corpus(folder / "texts", choose) if row["text"]]
    expression, kept = an_expression(choose)
    pool = choose.choice(["none", "none", "mean", "max", "sum", "first", "last"])
    letters = [[SHOWN[b] for b in row["text"].encode()] for row in rows]
    chosen = [sorted(kept(row["text"], text)) for row, text in zip(rows, letters, strict=True)]
    if not any(chosen):
        expression, chosen = "all", [[*range(len(text))] for text in letters]
    shards = choose.randint(1, 3)
    config = copy.deepcopy(config)
    OmegaConf.set_readonly(config, False)
    config.corpus.path, config.extraction.shards = str(folder / "texts"), shards
    config.rows.keep, config.rows.pool = expression, Pool[pool]
    tokens.tokenize(config, folder / "tokens.h5")
    found = [extracted(folder, shard, pool, choose) for shard in range(shards)]
    expected = [by_hand(text, places, pool) for text, places in zip(letters, chosen, strict=True)]
    owners = [
        (row["key"], row["label"], token)
        for row, of_text in zip(rows, expected, strict=True)
        for token, _ in of_text
    ]
    assert [owner for _, of_shard in found for owner in of_shard] == owners
    for number, point in enumerate(POINTS):
        values = [of_point[number] for of_text in expected for _, of_point in of_text]
        stored = np.concatenate([of_shard[point.name] for of_shard, _ in found])
        assert stored.shape == (len(values), WIDTH), expression
        np.testing.assert_allclose(stored, values, rtol=1e-6, atol=1e-5)


def by_hand(text, places, pool):
    """The rows of one text: the id of its token (of a pooled one the last), and its values in FP64
    by hook point.
    """
    ids = torch.tensor([ID[c] for c in text])
    windows = [ids[a : a + CONTEXT] for a in range(0, len(ids), CONTEXT)]
    values = [
        torch.cat([states(w[None], number)[0] for w in windows]).double().numpy()[places]
        for number in range(len(POINTS))
    ]
    named = ids[places].tolist()
    if pool == "none" or not places:
        return [*zip(named, zip(*values, strict=True), strict=True)]
    take = {"mean": np.mean, "sum": np.sum, "max": np.max}.get(pool)
    if take is None:
        at = 0 if pool == "first" else -1
        return [(named[at], [rows[at] for rows in values])]
    return [(named[-1], [take(rows, axis=0) for rows in values])]


def extracted(folder, shard, pool, choose):
    """The rows of a shard by hook point, after jobs that were killed; for each the id and the label
    of its document, and its token, read by h5py alone.
    """
    of_shard = reading.read_job(folder / "tokens.h5", shard).shard
    chunk = choose.choice([3, 5, 64])
    lengths = np.diff(of_shard.window_offset)
    batches = batching.plan_batches(lengths, choose.choice([1, 20, 64]), chunk, 2)
    path = folder / f"{shard}.h5"
    spec = ShardSpec(of_shard, POINTS, CONTEXT, "fp32", len(batches), "x", {"kind": "shard"})
    work = Work(batches, of_shard, POINTS, "fp32", CPU, 0, 1.0, 1e-3, 64, pool)
    for job in itertools.count():
        killed_at = choose.choice([1, 2, 3, 100]) if job < KILLS else 100
        runner = Table(chunk, killed_at)
        plan = Plan(choose.choice([1, 20, 64]), chunk, CONTEXT, choose.choice([1, 2]))
        try:
            with ShardWriter(path, spec) as store:
                watch = MemoryWatch(CPU)
                run_batches(runner, work, plan, store, ShardProfile(None, path, ()), watch)
                store.finish()
            break
        except KeyboardInterrupt:
            continue
    with h5py.File(path) as file:
        assert (file["windows/batch"][:] > 0).all()
        rows = {p.name: file[f"hooks/{p.name}/activations"][:] for p in POINTS}
        ids = file["tokens/input_ids"][:]
        places = file["rows/token"][:] if "rows/token" in file else np.arange(len(ids))
        document = file["tokens/document"][:][places]
        document -= of_shard.window_document[0] if len(of_shard.window_document) else 0
        keys, labels = file["documents/id"][:], file["documents/columns/label"][:]
        named = zip(document.tolist(), ids[places].tolist(), strict=True)
        return rows, [(keys[d].decode(), int(labels[d]), token) for d, token in named]


def test_rows_that_wait_for_other_windows_must_fit_the_host(model, tmp_path):
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": "abc" * 10}) for _ in range(3)))
    cut = f"corpus.context_length={CONTEXT} extraction.shards=1"
    run = stages(tmp_path, model, f"corpus=text corpus.path={corpus} {cut} rows.pool=mean")
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    of_shard = reading.read_job(tmp_path / "tokens.h5", 0).shard
    batches = batching.plan_batches(np.diff(of_shard.window_offset), 1, 64)
    selection = Selection(of_shard, "mean", "fp32")
    selection.check_room(batches, POINTS)
    wide = HookPoint("wide", 0, "hook_resid_post", (1 << 40,))
    with pytest.raises(MemoryPlanError, match=r"rows.pool: .* take .*; raise extraction.shards"):
        selection.check_room(batches, [wide])
