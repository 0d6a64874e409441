"""The one module that speaks to accelerators: which stream a copy runs on and what it waits for,
what counts as memory that ran out, what pinned memory takes, and that FP32 is FP32.

torch's streams and events are stood in for by ones that write down what is queued on them.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from theloom.devices import accelerator, gpu, gpu_lease, host, pinned, streams
from theloom.devices.host import DeviceMemory
from theloom.devices.streams import DONE, SideStreams
from theloom.errors import ConfigError

GPU0, GPU1 = torch.device("cuda:0"), torch.device("cuda:1")


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, diary, name, device):
        self.diary, self.name, self.device = diary, name, device

    def wait_event(self, event):
        self.diary.append(("wait", self.name, event.stream.name))


class Value:
    """Memory of a device that notes the stream on which it is copied."""

    def __init__(self, diary, device, current):
        self.diary, self.device, self.current = diary, device, current

    def copy_(self, source, non_blocking=False):
        self.diary.append(("copy", self.current[-1].name, non_blocking))


@pytest.fixture
def queued(monkeypatch):
    """Streams and events of two GPUs; gives the list of what was queued, and a maker of values."""
    diary, made = [], []
    computing = {n: Stream(diary, f"computing {n}", torch.device("cuda", n)) for n in (0, 1)}
    current = [computing[0]]

    def stream(device):
        made.append(Stream(diary, f"side {device.index}", device))
        return made[-1]

    class Event:
        def __init__(self, enable_timing=False, blocking=False):
            assert blocking  # a thread that waits must not spin

        def record(self, on):
            self.stream = on
            diary.append(("record", on.name))

        def synchronize(self):
            diary.append(("host waits", self.stream.name))

    @contextlib.contextmanager
    def use(on):
        current.append(on)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing[device.index])
    return diary, lambda device: Value(diary, device, current)


def test_a_value_leaves_on_a_stream_of_its_own_device(queued):
    diary, value = queued
    sides, place = SideStreams(), value(torch.device("cpu"))
    for device in (GPU1, GPU0, GPU1):
        streams.copy_out(value(device), place, sides)
    for number, n in enumerate((1, 0, 1)):
        assert diary[4 * number : 4 * number + 4] == [
            ("record", f"computing {n}"),
            ("wait", f"side {n}", f"computing {n}"),
            ("copy", f"side {n}", True),
            ("record", f"side {n}"),
        ]


def test_a_value_is_kept_until_its_copy_has_been_waited_for(queued):
    diary, value = queued
    gone = []

    class Noted(Value):
        def __del__(self):
            gone.append(diary[-1])

    leaving = Noted(diary, GPU0, [None])
    copied = streams.copy_out(leaving, value(torch.device("cpu")), SideStreams())
    del leaving
    assert not gone
    copied.synchronize()
    assert gone == [("host waits", "side 0")]


def test_a_copy_to_a_gpu_waits_for_all_it_is_told_to(queued):
    diary, value = queued
    sides, there = SideStreams(), value(GPU1)
    allocated = streams.mark(GPU1)
    arrived = streams.copy_in(value(torch.device("cpu")), there, sides, allocated, DONE)
    arrived.before_next()
    assert diary == [
        ("record", "computing 1"),
        ("wait", "side 1", "computing 1"),
        ("copy", "side 1", True),
        ("record", "side 1"),
        ("wait", "computing 1", "side 1"),
    ]


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_devices_without_streams_copy_at_once(kind):
    class OnDevice(Value):
        def copy_(self, source, non_blocking=False):
            self.diary.append(non_blocking)

    diary = []
    value, place = (OnDevice(diary, torch.device(d), []) for d in (kind, "cpu"))
    assert streams.copy_out(value, place, SideStreams()) is DONE
    assert streams.copy_in(place, value, SideStreams(), DONE) is DONE
    assert diary == [False, False]
    assert streams.mark(torch.device(kind)) is DONE


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_memory_that_ran_out(error, ran_out):
    assert accelerator.is_out_of_memory(error) is ran_out


def test_pinned_memory_is_counted_as_torch_takes_it(monkeypatch):
    monkeypatch.setattr(pinned, "_not_rounded", lambda: False)
    assert [pinned.pinned_bytes(n) for n in (0, 1, 5000, 70 * 10**9)] == [0, 4096, 8192, 1 << 37]
    monkeypatch.setattr(pinned, "_not_rounded", lambda: True)
    assert pinned.pinned_bytes(70 * 10**9) == -(-70 * 10**9 // 4096) * 4096
    assert pinned.pinned_bytes(5000) == 8192


def test_torch_is_told_not_to_round_large_pinned_pieces():
    settings = subprocess.run(
        [sys.executable, "-c", "import torch; from theloom.devices import pinned; "
         "pinned.pinned_bytes(1 << 40); print(torch._C._accelerator_getAllocatorSettings())"],
        env=os.environ | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout  # fmt: skip
    assert "pinned_max_round_threshold_mb:64" in settings
    assert "max_split_size_mb:128" in settings


def test_what_may_not_be_pinned_is_plain_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr(host, "memory", lambda: DeviceMemory(1 << 20, 1 << 20))
    assert not pinned.may_pin(1 << 20)
    assert pinned.host_bytes(1_000_000) == 1_000_000
    made = pinned.pinned_empty(1 << 20, torch.uint8, GPU0)
    assert len(made) == 1 << 20
    assert "cannot be pinned" in caplog.text


def test_fp32_is_fp32_whatever_the_environment_says():
    script = (
        "from theloom.devices import accelerator as a; import torch; "
        "torch.set_float32_matmul_precision('medium'); before = a.arithmetic(); a.exact_fp32(); "
        "print(before['tf32_matmul'], before['tf32_convolution'], a.arithmetic())"
    )
    env = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("True True {'float32_matmul_precision': 'highest', ")
    assert "'tf32_matmul': False, 'tf32_convolution': False" in done.stdout
    assert "'bf16_reduced_precision_reduction': True" in done.stdout


def test_the_memory_watch_and_the_warning_look_at_every_gpu_of_the_job(monkeypatch, caplog):
    from theloom.devices.peak_memory import MemoryWatch

    monkeypatch.setattr(gpu_lease, "_held", ("GPU-a", "GPU-b"))
    for name, values in {
        "memory_allocated": (1, 5),
        "max_memory_allocated": (7, 30),
        "reset_peak_memory_stats": (None, None),
        "mem_get_info": ((90, 100), (5, 100)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, v=values: v[device.index])
    monkeypatch.setattr(gpu, "available_memory", lambda _: (DeviceMemory(0, 0), ""))
    assert gpu.devices_of_job(GPU0) == (GPU0, GPU1)
    watch = MemoryWatch(GPU0)
    assert (watch.now, watch.peak) == (5, 30)
    assert gpu.warn_above(0.85, GPU0)
    assert "cuda:1 memory: 95.0% in use" in caplog.text
    assert "cuda:0" not in caplog.text


def test_a_cache_that_no_tensor_uses_is_free_for_this_process(monkeypatch):
    figures = {"mem_get_info": (2, 100), "memory_reserved": 90, "memory_allocated": 30}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert gpu.device_memory(GPU0) == DeviceMemory(100, 62)


@pytest.mark.parametrize("requested", ["mps", "xpu", "xpu:1", "cuda:9"])
def test_a_device_that_is_not_there_is_refused_by_its_name(requested):
    if accelerator.count(requested.partition(":")[0]):
        pytest.skip("it is there")
    with pytest.raises(ConfigError, match=rf"extraction\.device: {requested} is not there"):
        gpu.choose_device(requested)
