"""Batches: every row once, the same for a seed, split among workers and ranks, well mixed."""

import pickle

import numpy as np
import pytest
import theloom
import torch
from support import stages
from torch.utils.data import DataLoader

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def acts(tmp_path_factory, tiny_llama):
    return theloom.open(
        stages(tmp_path_factory.mktemp("run"), tiny_llama, "extraction.shards=3").all().activations
    )


def together(batches) -> list[int]:
    return [int(row) for batch in batches for row in batch]


def test_in_order_they_are_the_rows(acts):
    batches = list(acts.batches(HOOK, 300))
    assert [len(b) for b in batches] == [300] * 6 + [200]
    assert torch.equal(torch.cat(batches), acts[HOOK][:])


@pytest.mark.parametrize("workers", [0, 3])
def test_every_row_comes_once(acts, workers):
    rows = acts.dataset("row", 128, shuffle=True, block_rows=16, buffer_rows=512)
    loader = DataLoader(rows, batch_size=None, num_workers=workers)
    assert sorted(together(loader)) == list(range(2000))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_right_rows_however_they_are_started(acts, start):
    batches = acts.dataset([HOOK, "row", "input_ids"], 128, shuffle=True, block_rows=16)
    acts[HOOK][:5]  # the files are mapped before the workers start
    seen = []
    for batch in DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=start):
        assert torch.equal(batch[HOOK], acts[HOOK][batch["row"]])
        assert np.array_equal(batch["input_ids"].numpy(), acts.input_ids.numpy(batch["row"]))
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(2000))


def test_a_seed_and_an_epoch_give_an_order(acts):
    def order(seed, epoch=0):
        rows = acts.dataset("row", 100, shuffle=True, seed=seed, block_rows=8)
        rows.set_epoch(epoch)
        return together(rows)

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, epoch=1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_rows(acts, world, drop_last):
    of_rank = [
        acts.dataset(
            "row", 60, shuffle=True, drop_last=drop_last, block_rows=64, rank=r, world_size=world
        )
        for r in range(world)
    ]
    batches = [list(rows) for rows in of_rank]
    assert [len(b) for b in batches] == [len(rows) for rows in of_rank]
    found = together(batch for some in batches for batch in some)
    if drop_last:
        assert len({len(b) for b in batches}) == 1
        assert all(len(b) == 60 for some in batches for b in some)
        assert len(set(found)) == len(found) > 2000 - world * (2 * 64 + 60)
    else:
        assert sorted(found) == list(range(2000))


def test_a_batch_mixes_as_well_as_is_said(acts):
    """Pairs of one block in a batch: (block_rows - 1) / (buffer_rows - 1) of all."""
    block, buffer = 32, 1000
    pairs = same = 0
    for seed in range(20):
        for batch in acts.batches(
            "row", 100, shuffle=True, seed=seed, block_rows=block, buffer_rows=buffer
        ):
            counts = np.unique(batch.numpy() // block, return_counts=True)[1]
            pairs += len(batch) * (len(batch) - 1)
            same += int((counts * (counts - 1)).sum())
    assert same / pairs == pytest.approx((block - 1) / (buffer - 1), rel=0.15)


def test_a_dataset_of_batches_can_be_pickled(acts):
    rows = acts.dataset(HOOK, 500)
    next(iter(rows))
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(torch.cat(list(again)), acts[HOOK][:])


def test_an_unknown_name_is_an_error_at_once(acts):
    with pytest.raises(theloom.errors.HookError, match="no hook point 'x'"):
        acts.batches("x", 10)
    with pytest.raises(ValueError, match="batch_size 0"):
        acts.batches(HOOK, 0)


def test_batches_are_a_trainer_s_endless_buffer(acts):
    scale = acts.scale(HOOK, "dictionary_learning")
    buffer = acts.batches(HOOK, 1000, shuffle=True, epochs=None, scale=scale)
    taken = [next(buffer) for _ in range(5)]
    assert {b.dtype for b in taken} == {torch.float32}
    assert not torch.equal(taken[0], taken[2])  # another pass, in another order
    both = torch.cat(taken[:2]).square().sum(dim=1)
    assert both.mean().item() == pytest.approx(1, rel=1e-5)
    assert buffer.config["d_submodule"] == 64
    assert (buffer.config["io"], buffer.config["out_batch_size"]) == ("out", 1000)


def test_the_scale_of_selected_rows_is_theirs(acts):
    some = acts.taking(np.arange(7, 900))
    rows = some[HOOK][:].double()
    assert 1 / some.scale(HOOK, "saelens") == pytest.approx(rows.norm(dim=1).mean().item() / 8)
