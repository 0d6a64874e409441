"""Every wait and every copy of the extraction is needed: left out, or done on another stream, it
gives wrong rows in one of the orders that streams allow.

The waits and copies are not listed here: a run tells which lines make them, and each is then left
out in a run of its own. Should one turn out not to be needed, or be added and not be noticed, a
test fails.
"""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import POLICIES
from simulated_cuda.streams import Event, Stream
from simulated_runs import Prepared, Rows, build, cpu_rows, difference, machine, prepare
from theloom.devices import accelerator
from theloom.engine.layerwise import residual_store
from theloom.errors import StoppedError, StoreError
from theloom.store.ring_buffer import Ring

EXECUTIONS = {"chunks": "", "layerwise": "extraction.execution=layerwise"}

# waits whose lack gives no wrong rows, and what they are for
HARMLESS = {
    "_finish_copies": "no more than a few values wait on the device for their copy",
    "write": "the same, of residuals",
    "__exit__": "files are closed, peaks are measured",
    "__enter__": "peaks are measured",
}

Site = tuple[str, str]  # function, and what it calls


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return cpu_rows(tmp_path_factory.mktemp("cpu") / "run", model)


def is_wrong(run: Prepared, expected: Rows, folder: Path, policy: str) -> bool:
    """Whether an extraction gives other rows than the CPU, or an error."""
    extraction = run.again(folder)
    try:
        return difference(extraction.rows(policy=policy), expected) > 1e-5
    except Exception:  # NaN in the rows, an index out of range: noticed either way
        return True
    finally:
        shutil.rmtree(folder)


SEAM = {"synchronize", "before_next", "on", "mark", "use", "of", "finish"}


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
            if name not in ("copy_in", "copy_out"):
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


def noticed(run: Prepared, expected: Rows, folder: Path) -> bool:
    """Whether any order of the streams gives wrong rows."""
    return any(is_wrong(run, expected, folder, p) for p in ("copies_first", *POLICIES[::-1]))


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: prepare(folder / name, model, o, gpus=1) for name, o in EXECUTIONS.items()}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_each_wait_left_out_is_noticed(prepared, expected, tmp_path, execution):
    run, seen = prepared[execution], set()
    with waits(seen):
        assert not is_wrong(run, expected, tmp_path / "rows", "lazy")
    missed = set()
    for site in sorted(seen):
        if site[0] in HARMLESS:
            continue
        with waits(set(), left_out=site):
            if not noticed(run, expected, tmp_path / "rows"):
                missed.add(site)
    assert not missed
    needed = {name for name, _ in seen} - HARMLESS.keys()
    assert len(needed) >= {"chunks": 2, "layerwise": 6}[execution], needed


@contextmanager
def copies(seen: set[str], elsewhere: str = "") -> Iterator[None]:
    """Note which functions copy on a side stream; one of them copies on a stream that nobody waits
    for.
    """
    original = accelerator.use

    def use(stream: Any) -> Any:
        site = caller()
        if stream is not None:
            seen.add(site)
            if site == elsewhere:
                return original(torch.cuda.Stream(stream.device))
        return original(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "use", use)
        yield


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_each_copy_on_another_stream_is_noticed(prepared, expected, tmp_path, execution):
    run, seen = prepared[execution], set()
    with copies(seen):
        assert not is_wrong(run, expected, tmp_path / "rows", "lazy")
    for site in sorted(seen):
        with copies(set(), elsewhere=site):
            assert noticed(run, expected, tmp_path / "rows"), site
    assert len(seen) >= {"chunks": 1, "layerwise": 3}[execution], seen


@pytest.mark.parametrize(("function", "number"), [("send", 0), ("_send", 0), ("_send", 1)])
def test_each_mark_that_a_copy_to_the_device_waits_for_is_needed(
    prepared, expected, tmp_path, monkeypatch, function, number
):
    """Of a new buffer the work that had its memory, of a used one the work that reads it, and of
    residuals the copy that brought them to the host.
    """
    original = accelerator.copy_in

    def copy_in(source: Any, there: Any, sides: Any, *after: Any) -> Any:
        if sys._getframe(1).f_code.co_name == function:
            after = (*after[:number], *after[number + 1 :])
        return original(source, there, sides, *after)

    monkeypatch.setattr(accelerator, "copy_in", copy_in)
    assert noticed(prepared["layerwise"], expected, tmp_path / "rows")


def test_a_new_buffer_written_before_its_memory_is_free_is_noticed(
    prepared, expected, tmp_path, monkeypatch
):
    def no_mark(device: torch.device, timing: bool = False) -> Any:
        is_new = sys._getframe(1).f_code.co_name == "for_reading"
        return accelerator.DONE if is_new else original(device, timing)

    original = accelerator.mark
    monkeypatch.setattr(accelerator, "mark", no_mark)
    assert noticed(prepared["layerwise"], expected, tmp_path / "rows")


def test_a_value_freed_before_it_is_copied_is_noticed(prepared, expected, tmp_path, monkeypatch):
    original = accelerator.Mark.__init__

    def forgets(self: Any, stream: Any, timing: bool = False, held: Any = None) -> None:
        original(self, stream, timing)

    monkeypatch.setattr(accelerator.Mark, "__init__", forgets)
    for run in prepared.values():
        assert noticed(run, expected, tmp_path / "rows")


def test_a_ring_that_gives_a_place_twice_is_noticed(prepared, expected, tmp_path, monkeypatch):
    def first_place(self: Ring, size: int) -> int:
        return 0

    monkeypatch.setattr(Ring, "_room_for", first_place)
    for run in prepared.values():
        assert noticed(run, expected, tmp_path / "rows")


def test_copies_on_the_first_gpu_s_stream_are_noticed(model, expected, tmp_path, monkeypatch):
    """Of a value on the second GPU: on a real one the copy would run on that GPU's own stream."""
    run = prepare(tmp_path / "run", model, "", gpus=2)
    assert not is_wrong(run, expected, tmp_path / "rows", "random")
    original = accelerator.SideStreams.of

    def first(self: Any, device: torch.device) -> Any:
        return original(self, torch.device("cuda", 0))

    monkeypatch.setattr(accelerator.SideStreams, "of", first)
    assert noticed(run, expected, tmp_path / "rows")


def test_a_checkpoint_of_residuals_that_are_still_under_way_is_noticed(
    prepared, expected, tmp_path, monkeypatch
):
    """The job is stopped after it, and the next one resumes from it."""
    monkeypatch.setattr(residual_store, "BLOCKS_BETWEEN_CHECKPOINTS", 1)
    wrong = []
    for left_out in (None, ("block_done", "event")):
        run = prepared["layerwise"].again(tmp_path / f"rows-{left_out}")
        with waits(set(), left_out), machine(1, policy="lazy") as world:
            world.schedule.at[700] = lambda: signal.raise_signal(signal.SIGINT)
            with pytest.raises(StoppedError, match=r"in block [123]"):
                run.run.extract()
        try:
            wrong.append(difference(run.rows(), expected) > 1e-5)
        except StoreError:  # NaN
            wrong.append(True)
    assert wrong == [False, True]
