"""Random corpora, expressions, pools, chunks and kills: every stored row is that of its tokens.

The model is a table of states by token and position, so that a thousand jobs take seconds; all
else is the pipeline's own, from the texts to the finished files.
"""

import json
import os
import random

import h5py
import numpy as np
import pytest
import torch
from support import build_tiny, stages, with_bytes
from theloom.corpus import batching, tokens
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

SEEDS = int(os.environ.get("THELOOM_SEEDS", "12"))
CPU = torch.device("cpu")
WIDTH, CONTEXT = 4, 16
POINTS = residual_points(1, WIDTH)
STATES = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))


# the ids of a byte-level tokenizer: the places of its alphabet in order
ID = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


class Table:
    """Runs token ids (window, position): a state is the token's, plus its position and its block.
    It is killed at a pass of a given number.
    """

    def __init__(self, chunk_size, killed_at):
        self.chunk_size, self.left = chunk_size, killed_at

    def run(self, ids, sink, captured=None, lengths=None):
        self.left -= 1
        for number, point in enumerate(POINTS):
            for start, end in spans(ids.shape[1], self.chunk_size):
                sink(point.name, start, states(ids, number)[:, start:end])
            if self.left == 0:  # with half of the batch handed over
                raise KeyboardInterrupt

    def alone(self, ids, points):
        return {p.name: states(ids, POINTS.index(p))[0] for p in points}


def states(ids, number):
    return STATES[ids] * (1 + torch.arange(ids.shape[1])[:, None]) + number


def an_expression(choose, depth=3):
    """A random expression, and the tokens of a text that it keeps."""
    if depth and choose.random() < 0.6:
        left, of_left = an_expression(choose, depth - 1)
        if choose.random() < 0.3:
            return f"~({left})", lambda text: {*range(len(text))} - of_left(text)
        right, of_right = an_expression(choose, depth - 1)
        if choose.random() < 0.5:
            return f"({left}) & ({right})", lambda text: of_left(text) & of_right(text)
        return f"({left})|({right})", lambda text: of_left(text) | of_right(text)
    a, b = choose.randint(-6, 6), choose.choice([None, *range(-6, 7)])
    n = choose.randint(1, 5)
    return choose.choice(
        [
            ("all", lambda text: {*range(len(text))}),
            ("first", lambda text: {0}),
            (f"last({n})", lambda text: {*range(len(text))[-n:]}),
            (f"[{a}:{'' if b is None else b}]", lambda text: {*range(len(text))[a:b]}),
            ("match('a')", lambda text: {i for i, c in enumerate(text) if c == "a"}),
        ]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_bytes(build_tiny("llama", tmp_path_factory.mktemp("model"), vocab_size=256))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_stored_row_is_that_of_its_tokens(seed, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    choose = random.Random(seed)
    expression, kept = an_expression(choose)
    pool = choose.choice(["none", "none", "mean", "max", "sum", "first", "last"])
    texts = [
        "".join(choose.choices("abc", k=choose.choice([1, 3, 15, 16, 17, 40, 60])))
        for _ in range(choose.randint(2, 9))
    ]
    texts[0] = "abcabc" * 6
    chosen = [sorted(kept(text)) for text in texts]
    if not any(chosen):
        expression, chosen = "all", [[*range(len(text))] for text in texts]
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    shards = choose.randint(1, 3)
    run = stages(
        tmp_path,
        model,
        f"corpus=text corpus.path={corpus} corpus.context_length={CONTEXT} "
        f'extraction.shards={shards} rows.pool={pool} "rows.keep={expression}"',
    )
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    found = [extracted(tmp_path, shard, pool, choose) for shard in range(shards)]
    for number, point in enumerate(POINTS):
        expected = [
            row
            for text, places in zip(texts, chosen, strict=True)
            for row in by_hand(text, places, pool, number)
        ]
        rows = np.concatenate([of_shard[point.name] for of_shard in found])
        assert rows.shape == (len(expected), WIDTH), expression
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-5)


def by_hand(text, places, pool, number):
    """The rows of one text in FP64."""
    ids = torch.tensor([ID[c] for c in text])
    windows = [ids[a : a + CONTEXT] for a in range(0, len(ids), CONTEXT)]
    rows = torch.cat([states(w[None], number)[0] for w in windows]).double().numpy()[places]
    if pool == "none" or not len(rows):
        return [*rows]
    if pool in ("first", "last"):
        return [rows[0 if pool == "first" else -1]]
    return [{"mean": np.mean, "sum": np.sum, "max": np.max}[pool](rows, axis=0)]


def extracted(folder, shard, pool, choose):
    """The rows of a shard by hook point, after jobs that were killed."""
    of_shard = tokens.read_job(folder / "tokens.h5", shard).shard
    chunk = choose.choice([3, 5, 64])
    lengths = np.diff(of_shard.window_offset)
    batches = batching.plan_batches(lengths, choose.choice([1, 20, 64]), chunk, 2)
    path = folder / f"{shard}.h5"
    spec = ShardSpec(of_shard, POINTS, CONTEXT, "fp32", len(batches), "x", {"kind": "shard"})
    work = Work(batches, of_shard, POINTS, "fp32", CPU, 0, 1.0, 1e-3, 64, pool)
    while True:
        runner = Table(chunk, choose.choice([1, 2, 3, 100]))
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
        return {p.name: file[f"hooks/{p.name}/activations"][:] for p in POINTS}


def test_rows_that_wait_for_other_windows_must_fit_the_host(model, tmp_path):
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": "abc" * 10}) for _ in range(3)))
    cut = f"corpus.context_length={CONTEXT} extraction.shards=1"
    run = stages(tmp_path, model, f"corpus=text corpus.path={corpus} {cut} rows.pool=mean")
    tokens.tokenize(run.config("tokens"), tmp_path / "tokens.h5")
    of_shard = tokens.read_job(tmp_path / "tokens.h5", 0).shard
    batches = batching.plan_batches(np.diff(of_shard.window_offset), 1, 64)
    selection = Selection(of_shard, "mean", "fp32")
    selection.check_room(batches, POINTS)
    wide = HookPoint("wide", 0, "hook_resid_post", (1 << 40,))
    with pytest.raises(MemoryPlanError, match=r"rows.pool: .* take .*; raise extraction.shards"):
        selection.check_room(batches, [wide])
