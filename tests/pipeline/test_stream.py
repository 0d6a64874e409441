"""A stream's rows are those of the pipeline's file, bit for bit; it is bounded, its errors are one
line, and it leaves nothing behind.
"""

import copy
import faulthandler
import gc
import json
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import theloom
import torch
from support import ROOT, forking, stages
from theloom.dataset.merge import merge_shards
from theloom.engine.row_queue import QueueClosedError, RowBlock, RowQueue
from theloom.errors import ConfigError, HookError, StoreError, TheLoomError
from theloom.pipeline import extract_shard
from theloom.store.encoding import scaled
from torch.utils.data import DataLoader

HOOKS = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
WORDS = [
    "corpus.max_tokens=1500",
    "corpus.context_length=100",
    "memory.streaming_chunk_size=64",
    "extraction.batch_tokens=256",
    "extraction.device=cpu",
    "extraction.shards=3",
]


@pytest.fixture(autouse=True)
def _no_hang():
    faulthandler.dump_traceback_later(1800, exit=True)  # a busy machine is no hang
    yield
    faulthandler.cancel_dump_traceback_later()


def opened(model, hooks, *words, **others):
    overrides = [f"model.source={model}", *WORDS, *words]
    return theloom.stream(
        "custom", hooks, 128, overrides=overrides, config_dir=ROOT / "config", **others
    )


def file_of(folder, model, hooks, *words):
    """The file that the pipeline's stages write for the same words."""
    listed = f"memory.activation_cache_filter=[{','.join(hooks)}]"
    return theloom.open(stages(folder, model, " ".join([*WORDS, *words, listed])).all().activations)


@pytest.fixture(scope="module")
def acts(tmp_path_factory, tiny_llama):
    return file_of(tmp_path_factory.mktemp("run"), tiny_llama, HOOKS)


@pytest.fixture(scope="module")
def prepared(tiny_llama):
    with opened(tiny_llama, [*HOOKS, "row", "input_ids", "document", "position"]) as stream:
        yield stream


def like(stream, **changed):
    """The same stream with other attributes."""
    other = copy.copy(stream)
    other.__dict__.update(changed)
    return other


def check(batches, acts) -> list[int]:
    """All columns are those of the file; gives the numbers of the rows."""
    seen = []
    for batch in batches:
        rows = batch["row"].numpy()
        for hook in acts.hooks:
            assert torch.equal(batch[hook], acts[hook][rows]), hook
        for name in ("input_ids", "document", "position"):
            assert np.array_equal(batch[name].numpy(), acts.rows_of(name).numpy(rows)), name
        seen += rows.tolist()
    return seen


@pytest.mark.parametrize("buffer", [0, 400])
def test_rows_are_those_of_the_file_each_once(prepared, acts, buffer):
    batches = list(like(prepared, shuffle_buffer=buffer))
    assert [len(b["row"]) for b in batches] == [128] * 11 + [92]
    seen = check(batches, acts)
    assert sorted(seen) == list(range(1500)) == list(range(prepared.rows))
    assert batches[0][HOOKS[0]].dtype == acts.dtype


def test_rows_with_a_scale_are_what_their_file_gives(prepared, acts, tmp_path):
    folder = tmp_path / "stream"
    shutil.copytree(prepared._folder, folder)
    frozen_config = json.loads((folder / "extract.json").read_text())
    frozen_config["config"]["store"]["dtype"] = "int8"
    (folder / "extract.json").write_text(json.dumps(frozen_config))
    for batch in like(prepared, _folder=folder):
        for hook in acts.hooks:
            exact = scaled.round_trip(acts[hook][batch["row"].numpy()], "int8")
            assert torch.equal(batch[hook], exact)


def test_it_has_the_provenance_of_the_file(prepared, acts):
    assert prepared.hooks == acts.hooks
    for name in ("model_fingerprint", "model_precision", "corpus_hash", "precision", "device"):
        assert prepared.attributes[name] == acts.attributes[name], name


def test_a_seed_gives_an_order_and_each_epoch_another(prepared):
    def order(**changed):
        names = {"names": ["row"], "single": True, "shuffle_buffer": 256}
        return torch.cat(list(like(prepared, **names, **changed))).tolist()

    twice = order(epochs=2)
    assert sorted(twice[:1500]) == sorted(twice[1500:]) == list(range(1500))
    assert twice[:1500] != twice[1500:]
    assert order() == twice[:1500] != order(seed=1)


def test_workers_and_ranks_share_the_rows(prepared, acts):
    seen = []
    for rank in (0, 1):
        stream = like(prepared, shuffle_buffer=64, rank=rank, world_size=2)
        workers = {"num_workers": 2, "multiprocessing_context": forking()} if rank else {}
        seen += check(DataLoader(stream, batch_size=None, **workers), acts)
    assert sorted(seen) == list(range(1500))
    assert prepared._folder.is_dir()  # the workers left it alone


def test_a_copy_for_another_process_does_not_own_the_folder(prepared):
    other = pickle.loads(pickle.dumps(prepared))
    other.close()
    del other
    assert prepared._folder.is_dir()


def test_leaving_early_stops_the_thread_and_frees_the_model(prepared):
    def models():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o).__name__ == "LlamaModel"}

    before, threads = models(), {*threading.enumerate()}  # of other tests, which may end here
    for number, _ in enumerate(like(prepared, shuffle_buffer=0, epochs=None)):
        if number == 20:
            assert models() - before
            assert {*threading.enumerate()} - threads
            break
    assert models() <= before
    assert {*threading.enumerate()} <= threads


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (HOOKS[1], ["rows.pool=mean", "rows.keep=~first"]),
        ("blocks.1.attn.hook_pattern", ["rows.keep=last(2) | first", "store.dtype=bf16"]),
    ],
    ids=["pooled", "kept"],
)
def test_other_rows_are_those_of_the_file_too(tmp_path, monkeypatch, tiny_llama, hook, words):
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    for folder in (temporary, elsewhere):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(elsewhere)
    stream = opened(tiny_llama, [hook, "row", "input_ids", "document", "position"], *words)
    (tmp_path / "run/shards").mkdir(parents=True)
    shards = [tmp_path / f"run/shards/{n:05d}-of-00003.h5" for n in range(3)]
    files = [stream._folder / n for n in ("extract.json", "estimate.h5", "model.h5", "tokens.h5")]
    for number, shard in enumerate(shards):
        extract_shard.extract_shard(*files, number, shard)
    merge_shards(shards, "virtual", tmp_path / "run/activations.h5")
    found = theloom.open(tmp_path / "run/activations.h5")
    assert sorted(check(stream, found)) == list(range(len(found)))
    kinds = {file.suffix for file in temporary.rglob("*") if file.is_file()}
    assert kinds == {".json", ".h5", ".lock"}
    del stream
    assert not list(temporary.iterdir())
    assert not list(elsewhere.iterdir())


def test_an_error_of_the_producer_is_one_line_of_the_consumer(tiny_llama, tmp_path):
    stream = opened(tiny_llama, HOOKS[1])
    (stream._folder / "tokens.h5").unlink()
    with pytest.raises(StoreError, match=r"tokens\.h5") as error:
        list(stream)
    assert "\n" not in str(error.value)
    stream.close()
    with pytest.raises(ConfigError, match="it is closed; open another one"):
        list(stream)


@pytest.mark.parametrize(
    ("words", "others", "message"),
    [
        (["extraction.execution=layerwise"], {}, "layer by layer there is no row before the last"),
        (["answers.source=model"], {}, "a stream samples no answers"),
        (["verify.seed=1,2"], {}, "2 runs are requested"),
        (["memory.activation_cache_filter=[blocks.0.hook_resid_pre]"], {}, "both hooks and memory"),
        (["corpus.max_tokns=3"], {}, "did you mean 'corpus.max_tokens'"),
        ([], {"shuffle_buffer": -1}, "shuffle_buffer -1 at least 0"),
    ],
    ids=["layerwise", "answers", "sweep", "hooks", "key", "size"],
)
def test_what_cannot_be_streamed_is_refused_at_once(tiny_llama, words, others, message):
    if words and words[0].startswith("corpus"):
        words = [w for w in words if not w.startswith("corpus.max_tokens=")]
    with pytest.raises(TheLoomError, match=message) as error:
        opened(tiny_llama, HOOKS[0], *words, **others)
    assert "\n" not in str(error.value)


def test_too_many_processes_for_the_shards_are_refused(prepared):
    with pytest.raises(ConfigError, match=r"set extraction\.shards=4 or a multiple"):
        like(prepared)._share(0, 4)
    pooled = like(prepared, _pooled=True)
    with pytest.raises(ConfigError, match=r"set extraction\.shards=4, or fewer workers"):
        pooled._check_process(4, True)
    with pytest.raises(theloom.errors.MemoryPlanError, match="lower it, or name fewer"):
        list(like(prepared, shuffle_buffer=1 << 40))


def test_a_hook_point_that_the_model_lacks_is_refused(tiny_llama):
    with pytest.raises(HookError, match=r"blocks\.9\.hook_resid_post"):
        opened(tiny_llama, "blocks.9.hook_resid_post")
    with pytest.raises(ConfigError, match="name one at least"):
        opened(tiny_llama, "row")


def test_a_queue_holds_so_many_blocks_and_wakes_its_writer_when_closed():
    queue, put, ended = RowQueue(2), [], []

    def write():
        try:
            for number in range(9):
                queue.put(RowBlock(np.array([number]), {}, {}))
                put.append(number)
        except QueueClosedError:
            ended.append(True)

    thread = threading.Thread(target=write)
    thread.start()

    def fills(count: int) -> None:
        """It comes so far, however slow the machine is, and then waits for room."""
        while len(put) < count:
            time.sleep(0.01)
        thread.join(0.2)
        assert put == list(range(count))

    fills(2)
    assert queue.get().number.tolist() == [0]
    fills(3)
    queue.close()
    thread.join(60)
    assert ended == [True]
