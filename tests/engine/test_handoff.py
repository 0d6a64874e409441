"""Rows on their way to the file: in order, unharmed by what the model does next, bounded, and never
past an error.
"""

import random
import threading
import time

import pytest
import torch
from theloom.corpus.batching import Batch
from theloom.engine.handoff import Handoff
from theloom.engine.selection import WholeStep
from theloom.store import ring_buffer
from theloom.store.ring_buffer import Ring, ring_bytes

CPU = torch.device("cpu")


class Written:
    """A writer that keeps what it is given, slowly if requested to."""

    def __init__(self, seconds=0.0, fails_at=None):
        self.rows, self.commits, self.seconds, self.fails_at = [], [], seconds, fails_at
        self.metrics = {"seconds_disk": 5.0}

    def write(self, window, hook, start, rows):
        if len(self.rows) == self.fails_at:
            raise OSError("the disk is gone")
        time.sleep(self.seconds)
        self.rows.append((window, hook, start, rows.clone()))

    def batch_done(self, rows, last=False):
        self.commits.append((rows, last))


def test_rows_arrive_in_order_without_padding_as_they_were_handed_over():
    writer, batch = Written(), Batch((7, 3), (5, 2))
    value = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    with Handoff(writer, CPU, value.nbytes) as handoff:
        for start in (0, 3):
            handoff.rows(WholeStep(batch, start), "a", value)
            value += 1  # as a model may do
        handoff.batch_done(7, True, {"seconds_disk": 5.0})
    first = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    expected = [(7, 0, first[0]), (3, 0, first[1, :2]), (7, 3, first[0, :2] + 1)]
    assert [(w, s) for w, _, s, _ in writer.rows] == [(w, s) for w, s, _ in expected]
    assert all(
        torch.equal(got, rows)
        for (_, _, _, got), (_, _, rows) in zip(writer.rows, expected, strict=True)
    )
    assert writer.commits == [(7, True)]
    assert writer.metrics["seconds_disk"] >= 5.0


def test_a_writer_s_error_stops_the_model_s_thread_even_while_it_waits(monkeypatch):
    monkeypatch.setitem(ring_buffer.RING_BYTES, "cpu", 0)
    value, handed = torch.zeros(1, 64, 64), []

    def run():
        with Handoff(Written(0.01, fails_at=2), CPU, value.nbytes) as handoff:
            for number in range(100):
                handoff.rows(WholeStep(Batch((0,), (64,)), 0), "a", value)
                handed.append(number)

    with pytest.raises(OSError, match="the disk is gone"):
        run()
    assert len(handed) < 10


def test_an_error_of_the_model_s_thread_drops_what_is_on_its_way():
    writer = Written(0.01)

    def run():
        with Handoff(writer, CPU, 1 << 14) as handoff:
            for _ in range(50):
                handoff.rows(WholeStep(Batch((0,), (64,)), 0), "a", torch.zeros(1, 64, 64))
            handoff.batch_done(64, True, {})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert writer.commits == []


def test_with_a_slow_disk_the_model_waits_and_memory_stays_bounded(monkeypatch):
    monkeypatch.setitem(ring_buffer.RING_BYTES, "cpu", 0)
    writer, value = Written(0.005), torch.zeros(1, 64, 64)
    most = 0
    with Handoff(writer, CPU, value.nbytes) as handoff:
        for number in range(40):
            handoff.rows(WholeStep(Batch((0,), (64,)), 0), "a", value)
            most = max(most, number + 1 - len(writer.rows))
    assert len(writer.rows) == 40
    assert most <= ring_bytes("cpu", value.nbytes) // value.nbytes + 1  # one more is being written
    assert handoff.seconds_waiting > 0


@pytest.mark.parametrize("seed", range(5))
def test_places_of_a_ring_never_overlap(seed):
    choose, buffer = random.Random(seed), Ring(4096)
    held = []

    def give_back_later():
        for _ in range(300):
            while not held:
                time.sleep(0)
            number, place = held[0]
            assert bool((place == number).all())
            held.pop(0)
            buffer.give_back()

    thread = threading.Thread(target=give_back_later)
    thread.start()
    for number in range(300):
        place = buffer.take((choose.randint(1, 500),), torch.int32)
        place.fill_(number)
        held.append((number, place))
    thread.join()
    with pytest.raises(ValueError, match="do not fit"):
        buffer.take((5000,), torch.uint8)


@pytest.mark.gpu
def test_a_gpu_s_values_arrive_as_they_were_when_they_were_handed_over():
    writer, device = Written(0.001), torch.device("cuda")
    with Handoff(writer, device, 1 << 22) as handoff:
        for number in range(50):
            value = torch.full((1, 1024, 1024), float(number), device=device)
            handoff.rows(WholeStep(Batch((0,), (1024,)), 0), "a", value)
            del value  # its memory is the next one's, but not before it is copied
    assert [float(rows.min()) for *_, rows in writer.rows] == list(range(50))
    assert [float(rows.max()) for *_, rows in writer.rows] == list(range(50))
