"""Every wait and every copy of the extraction is needed: left out, or done on another stream, it
gives wrong rows in one of the orders that streams allow.

The waits and copies are not listed here: a run tells which lines make them, and each is then left
out in a run of its own. Should one turn out not to be needed, or be added and not be noticed, a
test fails.
"""

import functools
import itertools
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import POLICIES, simulated
from simulated_cuda.streams import Event, Stream
from simulated_runs import Prepared, Rows, build, cpu_rows, difference, machine, prepare
from theloom.corpus.batching import Batch
from theloom.devices import streams
from theloom.engine.handoff import Handoff
from theloom.engine.layerwise import residual_store
from theloom.engine.selection import WholeStep
from theloom.errors import StoppedError, StoreError
from theloom.model import device_map
from theloom.store.ring_buffer import Ring
from theloom.store.writer import ShardWriter

LAYERWISE = "extraction.execution=layerwise"
# nothing else makes the host wait: one batch of one document, read behind the last block
ONE_PIECE = (
    f"{LAYERWISE} corpus.max_tokens=20 memory.activation_cache_filter=[blocks.3.hook_resid_post]"
)
EXECUTIONS = {"chunks": [""], "layerwise": [ONE_PIECE, LAYERWISE], "two GPUs": [""]}

# waits whose lack gives no wrong rows, and what they are for
HARMLESS = {
    "_finish_copies": "no buffer of the ring is given up while a copy into it is under way",
    "write": "no more than a few residuals wait on the device for their copy",
    "__exit__": "files are closed, peaks are measured",
    "__enter__": "peaks are measured",
    "wait": "the seconds of the last passes are measured",
}

# waits that matter where a copy falls far behind: tests of their own below
OF_SLOW_COPIES = {"_copy", "begin"}

Site = tuple[str, str]  # function, and what it calls


class Faulty:
    """A run of one execution, over one corpus or several, that a fault may be planted in.

    `expected` gives the rows of the CPU for what is requested of it.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        options: list[str],
        expected: Callable[[str], Rows],
        gpus: int = 1,
    ) -> None:
        self.runs, self._folder = [], folder / "extraction"
        for number, overrides in enumerate(options):
            prepared = prepare(folder / f"{number}", model, overrides, gpus)
            self.runs.append((prepared, expected(overrides.replace(LAYERWISE, "").strip())))

    def wrong(self, policy: str) -> bool:
        """Whether an extraction gives other rows than the CPU, or an error."""
        return any(self._wrong(run, expected, policy) for run, expected in self.runs)

    def _wrong(self, run: Prepared, expected: Rows, policy: str) -> bool:
        try:
            rows = run.again(self._folder).rows(policy=policy)
            return difference(rows, expected) > 1e-5
        except Exception:  # NaN in the rows, an index out of range: noticed either way
            return True
        finally:
            shutil.rmtree(self._folder)

    @property
    def noticed(self) -> bool:
        """Whether any order of the streams gives wrong rows."""
        return any(self.wrong(policy) for policy in ("copies_first", "eager", *POLICIES))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Faulty]:
    folder = tmp_path_factory.mktemp("runs")
    model, numbers = build(folder), itertools.count()

    @functools.cache
    def expected(requested: str) -> Rows:
        return cpu_rows(folder / f"cpu{next(numbers)}", model, requested)

    return {
        name: Faulty(folder / name, model, options, expected, gpus=2 if name == "two GPUs" else 1)
        for name, options in EXECUTIONS.items()
    }


SEAM = {"synchronize", "before_next", "let_go", "on", "mark", "use", "of", "finish"}


def caller() -> str:
    """The function of theloom that waits or copies; methods that only pass it on are looked
    through, and of the seam's two copies the caller is named too.
    """
    names: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and "/site-packages/" not in frame.f_code.co_filename:
        name = frame.f_code.co_name
        if "/theloom/" in frame.f_code.co_filename and name not in SEAM:
            names.append(name)
            if name not in ("copy_in", "copy_out", "copy_across"):
                break
        frame = frame.f_back
    return " of ".join(names)


@contextmanager
def waits(seen: set[Site], left_out: Site | None = None) -> Iterator[None]:
    """Note where the extraction waits; one of the waits does not come to pass."""

    def wrapped(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(self: Any, *args: Any) -> None:
            site = (caller(), kind)
            if site[0]:
                seen.add(site)
            if site != left_out:
                original(self, *args)

        return wait

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Event, "synchronize", wrapped("event", Event.synchronize))
        patch.setattr(Stream, "wait_event", wrapped("stream", Stream.wait_event))
        yield


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_each_wait_left_out_is_noticed(runs, execution):
    run, seen = runs[execution], set()
    with waits(seen):
        assert not run.wrong("lazy")
    missed = set()
    for site in sorted(seen):
        if site[0] in HARMLESS.keys() | OF_SLOW_COPIES:
            continue
        with waits(set(), left_out=site):
            if not run.noticed:
                missed.add(site)
    assert not missed
    needed = {name for name, _ in seen} - HARMLESS.keys()
    assert len(needed) >= {"chunks": 2, "layerwise": 6, "two GPUs": 5}[execution], needed


@contextmanager
def copies(seen: set[str], elsewhere: str = "") -> Iterator[None]:
    """Note which functions copy on a side stream; one of them copies on a stream that nobody waits
    for.
    """
    original = streams.use

    def use(stream: Any) -> Any:
        site = caller()
        if stream is not None:
            seen.add(site)
            if site == elsewhere:
                return original(torch.cuda.Stream(stream.device))
        return original(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "use", use)
        yield


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_each_copy_on_another_stream_is_noticed(runs, execution):
    run, seen = runs[execution], set()
    with copies(seen):
        assert not run.wrong("lazy")
    for site in sorted(seen):
        with copies(set(), elsewhere=site):
            assert run.noticed, site
    assert len(seen) >= {"chunks": 1, "layerwise": 3, "two GPUs": 2}[execution], seen


@pytest.mark.parametrize(("function", "number"), [("send", 0), ("_send", 0), ("_send", 1)])
def test_each_mark_that_a_copy_to_the_device_waits_for_is_needed(
    runs, monkeypatch, function, number
):
    """Of a new buffer the work that had its memory, of a used one the work that reads it, and of
    residuals the copy that brought them to the host.
    """
    original = streams.copy_in

    def copy_in(source: Any, there: Any, sides: Any, *after: Any) -> Any:
        if sys._getframe(1).f_code.co_name == function:
            after = (*after[:number], *after[number + 1 :])
        return original(source, there, sides, *after)

    monkeypatch.setattr(streams, "copy_in", copy_in)
    assert runs["layerwise"].noticed


def test_a_new_buffer_written_before_its_memory_is_free_is_noticed(runs, monkeypatch):
    def no_mark(device: torch.device, timing: bool = False) -> Any:
        is_new = sys._getframe(1).f_code.co_name == "for_reading"
        return streams.DONE if is_new else original(device, timing)

    original = streams.mark
    monkeypatch.setattr(streams, "mark", no_mark)
    assert runs["layerwise"].noticed


def test_a_value_freed_before_it_is_copied_is_noticed(runs, monkeypatch):
    original = streams.Mark.__init__

    def forgets(self: Any, stream: Any, timing: bool = False, held: Any = None) -> None:
        original(self, stream, timing)

    monkeypatch.setattr(streams.Mark, "__init__", forgets)
    for name in ("chunks", "layerwise"):
        assert runs[name].noticed


def test_a_ring_that_gives_a_place_twice_is_noticed(runs, monkeypatch):
    original = ShardWriter.write
    placed, written = [0], [0]

    def the_same_place(self: Any, size: int) -> int:
        placed[0] += 1
        return 0

    def behind(*args: Any) -> None:
        """Write when the next values have their places, however slow the machine is."""
        written[0] += 1
        end = time.monotonic() + 0.5  # behind the last values none come
        while placed[0] < written[0] + 2 and time.monotonic() < end:
            time.sleep(0.001)
        original(*args)

    monkeypatch.setattr(Ring, "_room_for", the_same_place)
    monkeypatch.setattr(ShardWriter, "write", behind)
    for name in ("chunks", "layerwise"):
        assert runs[name].noticed


def test_copies_on_the_first_gpu_s_stream_are_noticed(runs, monkeypatch):
    """Of a value on the second GPU: on a real one the copy would run on that GPU's own stream."""
    run = runs["two GPUs"]
    assert not run.wrong("random")
    original = streams.SideStreams.of

    def first(self: Any, device: torch.device) -> Any:
        return original(self, torch.device("cuda", 0))

    monkeypatch.setattr(streams.SideStreams, "of", first)
    assert run.noticed


@pytest.mark.parametrize("left_out", [None, ("block_done", "event")])
def test_a_checkpoint_of_residuals_that_are_still_under_way_is_noticed(
    runs, tmp_path, monkeypatch, left_out
):
    """The job is stopped after it, and the next one resumes from it."""
    block_done = residual_store.ResidualStore.block_done

    def and_stop(self: Any, blocks: int, *args: Any, **options: Any) -> None:
        block_done(self, blocks, *args, **options)
        if blocks == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(residual_store, "BLOCKS_BETWEEN_CHECKPOINTS", 1)
    run = runs["layerwise"].runs[0][0].again(tmp_path / "stopped")
    expected = runs["layerwise"].runs[0][1]
    with monkeypatch.context() as patch, waits(set(), left_out), machine(1, policy="lazy"):
        patch.setattr(residual_store.ResidualStore, "block_done", and_stop)
        with pytest.raises(StoppedError, match="in block 2"):
            run.run.extract()
    try:
        wrong = difference(run.rows(), expected) > 1e-5
    except StoreError:  # NaN
        wrong = True
    assert wrong == (left_out is not None)


@contextmanager
def lets_go(waits: bool) -> Iterator[None]:
    """Memory is used again behind the copy of what was in it, or at once."""
    with pytest.MonkeyPatch.context() as patch:
        if not waits:
            patch.setattr(streams.Mark, "before_next", lambda self: None)
        yield


@pytest.mark.parametrize("waits", [True, False])
def test_values_whose_copies_are_slow_keep_their_memory(waits):
    """Those that are handed over, while the writer's thread waits for no copy."""
    numbers, written, go_on = range(6), [], threading.Event()

    class Slow:
        def write(self, window: int, hook: str, start: int, rows: torch.Tensor) -> None:
            go_on.wait()
            written.append(float(rows.max()))

    with (
        simulated(policy="compute_first"),
        lets_go(waits),
        Handoff(Slow(), torch.device("cuda"), 4096) as handoff,
    ):
        for number in numbers:
            value = torch.full((1, 8, 8), float(number), device="cuda:0")
            handoff.rows(WholeStep(Batch((0,), (8,)), 0), "hook", value)
            del value
        go_on.set()
    assert (written == list(numbers)) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_values_for_the_next_gpu_whose_copies_are_slow_keep_their_memory(waits):
    class Two(torch.nn.Module):
        _skip_keys_device_placement = None

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x + 1)) * 2

    with simulated(devices=2, policy="compute_first"), lets_go(waits), torch.inference_mode():
        model, gpus = Two(), [torch.device("cuda", n) for n in (0, 1)]
        device_map.keep_all_busy(model, {"first": gpus[0], "second": gpus[1]})
        found = [model(torch.full((64,), float(n), device=gpus[0])) for n in range(8)]
        assert {f.device for f in found} == {gpus[1]}
        values = [f.cpu().tolist() for f in found]
    assert (values == [[2.0 * (n + 1)] * 64 for n in range(8)]) == waits
