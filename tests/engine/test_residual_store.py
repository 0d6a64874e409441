"""Residuals between blocks: in memory and on disk alike, and what a killed job left."""

import pytest
import torch
from theloom.engine.layerwise import residual_store
from theloom.engine.layerwise.residual_store import ResidualSpec, ResidualStore

SHAPES = ((1, 10, 4), (3, 5, 4), (2, 1, 4))
SPEC = ResidualSpec(SHAPES, torch.float32, "whose")


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def put(store, tensors):
    for number, tensor in enumerate(tensors):
        store.write(number, tensor)


def got(store):
    return [store.read(number) for number in range(len(SHAPES))]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("spilled", [False, True])
def test_a_checkpoint_is_taken_up_and_later_blocks_do_not_spoil_it(tmp_path, spilled, monkeypatch):
    monkeypatch.setattr(residual_store, "BLOCKS_BETWEEN_CHECKPOINTS", 2)
    commits = []
    with ResidualStore(SPEC, tmp_path / "shard", spilled) as store:
        assert store.take_up() == 0
        put(store, values(0))
        store.entered()
        for block in (1, 2, 3):
            assert same(got(store), values(block - 1))
            put(store, values(block))
            store.block_done(block, lambda block=block: commits.append(block))
        put(store, values(4)[:2])  # killed in the middle of the fourth block
    behind = 3 if spilled else 2
    assert commits == ([1, 2, 3] if spilled else [2])
    with ResidualStore(SPEC, tmp_path / "shard", spilled) as store:
        assert store.take_up() == behind
        assert same(got(store), values(behind))
        store.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spilled", [False, True])
def test_a_damaged_or_foreign_checkpoint_is_not_taken_up(tmp_path, spilled, caplog, monkeypatch):
    monkeypatch.setattr(residual_store, "BLOCKS_BETWEEN_CHECKPOINTS", 1)
    with ResidualStore(SPEC, tmp_path / "shard", spilled) as store:
        put(store, values(0))
        store.entered()
        put(store, values(1))
        store.block_done(1, lambda: None)
    for other in (
        ResidualSpec(SHAPES, torch.float32, "another's"),
        ResidualSpec(SHAPES[::-1], torch.float32, "whose"),
        ResidualSpec(SHAPES, torch.bfloat16, "whose"),
    ):
        with ResidualStore(other, tmp_path / "shard", spilled) as store:
            assert store.take_up() == 0
    begins = values(1)[0].numpy().tobytes()[:16]
    (newest,) = [f for f in tmp_path.glob("*.residuals.[01]") if f.read_bytes()[:16] == begins]
    damaged = bytearray(newest.read_bytes())
    damaged[20] ^= 1
    newest.write_bytes(damaged)
    with ResidualStore(SPEC, tmp_path / "shard", spilled) as store:
        assert store.take_up() == 0
    assert f"{newest.name} is damaged" in caplog.text
    newest.write_bytes(damaged[:-1])
    with ResidualStore(SPEC, tmp_path / "shard", spilled) as store:
        assert store.take_up() == 0


def test_no_checkpoint_is_kept_of_a_store_without_a_place(tmp_path):
    with ResidualStore(SPEC, None) as store:
        put(store, values(0))
        store.entered()
        store.block_done(8, lambda: pytest.fail("nothing to commit"))
        assert store.take_up() == 0
        assert same(got(store), values(0))


def test_another_precision_than_the_residual_s_is_not_rounded_silently():
    with (
        ResidualStore(ResidualSpec(SHAPES, torch.bfloat16, ""), None) as store,
        pytest.raises(AssertionError),
    ):
        store.write(1, values(0)[1])
