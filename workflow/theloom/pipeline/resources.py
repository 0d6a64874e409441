"""What the jobs of a run ask of a scheduler: from the estimate, before anything runs, in
milliseconds, without torch.

For Llama-like models with the numbers in their profile the closed form answers. For others the
profile's own `resources.*` stand, and where it has none, figures that hold most models.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from theloom.config import sharding
from theloom.config.auto import store_precision
from theloom.config.compose import Run
from theloom.config.frozen import to_config
from theloom.config.model_dims import ModelDims, dims_of_profile
from theloom.config.schema import Config
from theloom.devices import gpu_specs
from theloom.errors import TheLoomError
from theloom.memory import closed_form
from theloom.memory.estimators import ClosedForm
from theloom.model import files, weight_format
from theloom.planning import estimate, multi_gpu
from theloom.planning.estimate import Estimate
from theloom.terminal import lines

# Host memory of a job beside the estimate, MB: what CUDA's libraries map, the page of a weights
# file that is being read (hub models come in files of at most 5 GB), and what rows take on their
# way to the disk.
CUDA_LIBRARIES, WEIGHTS_FILE, ROWS_ON_THEIR_WAY = 3000, 5000, 400


SPARE = 1.15  # of host memory: allocators keep more than they are requested


UNKNOWN = {
    "mem_mb": 32_000,
    "runtime": 240,
    "verify_runtime": 240,
    "disk_mb": 10_000,
}  # of a model whose numbers no profile gives


READING = 200e6  # bytes per second, of weights and rows on a network file system


STARTING = 10  # minutes: a scheduler's prologue, imports from a network file system


TIMES_PLANNED = 3  # a time limit that is three times what is planned


ON_80_GB = 79.1e9  # what programs get of such a GPU


@dataclass(frozen=True)
class Resources:
    """What each job that holds the model asks for. MB are 10⁶ bytes, `runtime` minutes; None: not
    requested.
    """

    threads: int
    mem_mb: int
    load_mem_mb: int
    runtime: int
    verify_runtime: int
    disk_mb: int
    gpu: int
    gpu_model: str | None
    min_free_gpu_mb: int
    constraint: str | None


def planned(run: Run, results: Path) -> Run:
    """The run with every key of `resources` that its config leaves open, and the shards that it has
    begun with.

    `results` is the folder of all runs: a run that is there, over the same corpus, keeps its number
    of shards, though the planned throughput be another by now.
    """
    kept = _shards_begun(run, results) if run.shards_left_open else None
    settings: dict[str, Any] = run.config
    if kept is not None:
        settings = settings | {"extraction": settings["extraction"] | {"shards": kept}}
    found = of(to_config(settings))
    return replace(run, config=settings | {"resources": settings["resources"] | asdict(found)})


def _shards_begun(run: Run, results: Path) -> int | None:
    frozen = results / run.name / "config/tokens.json"
    try:
        before = json.loads(frozen.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError):
        return None
    now = run.stage("tokens")["config"]
    same = {k: v for k, v in before.items() if k != "extraction"} == {
        k: v for k, v in now.items() if k != "extraction"
    }
    return int(before["extraction"]["shards"]) if same else None


def of(settings: Config) -> Resources:
    """The resources of a run's jobs. Raises MemoryPlanError where no machine has GPUs enough."""
    requested, size = settings.resources, _covered(settings)
    on_gpu = settings.extraction.device != "cpu"
    found: dict[str, Any] = dict(UNKNOWN)
    if size is not None:
        found |= _from_estimate(settings, size, on_gpu)
    mem_mb = requested.mem_mb or found["mem_mb"]
    gpu = requested.gpu if requested.gpu is not None else found.get("gpu", int(on_gpu))
    return Resources(
        threads=requested.threads,
        mem_mb=mem_mb,
        load_mem_mb=requested.load_mem_mb or max(mem_mb, found.get("load_mem_mb", 0)),
        runtime=requested.runtime or found["runtime"],
        verify_runtime=requested.verify_runtime or requested.runtime or found["verify_runtime"],
        disk_mb=requested.disk_mb or found["disk_mb"],
        gpu=gpu,
        gpu_model=requested.gpu_model if gpu else None,
        min_free_gpu_mb=requested.min_free_gpu_mb
        or (found.get("min_free_gpu_mb", 0) if gpu else 0),
        constraint=requested.constraint,
    )


def _covered(settings: Config) -> ModelDims | None:
    """The model's numbers if the closed form holds for all that is requested."""
    declared = settings.model.architecture
    if declared is None or settings.extraction.attention.name == "eager":
        return None
    size = dims_of_profile(declared)
    if not closed_form.covers(size):
        return None
    estimator = ClosedForm(size)
    points = estimator.catalog().select(settings.memory.activation_cache_filter)
    return size if estimator.covers(points) else None


def _from_estimate(settings: Config, size: ModelDims, on_gpu: bool) -> dict[str, Any]:
    found = estimate.estimate(settings, ClosedForm(size), "cuda" if on_gpu else "cpu")
    precision = estimate.likely_precision(settings)
    kind = weight_format.weight_format_of(settings, precision).name
    store = store_precision(settings, precision)
    answer: dict[str, Any] = _minutes(settings, found, store)
    shards = settings.extraction.shards or 1
    if found.rows is not None:
        answer["disk_mb"] = 100 + _mb(1.1 * found.rows / shards * found.row_bytes[store])
    weights = _mb(found.weights[kind])
    if on_gpu:
        overhead = size.vocab_size * size.hidden_size * 2 / found.weights[kind]
        budget = settings.memory.memory_warning_threshold * _gpu_speed(settings)
        count = settings.resources.gpu or multi_gpu.gpus_for(
            found, kind, size.num_blocks, overhead, budget
        )
        of_one = multi_gpu.of_one(found, multi_gpu.share(size.num_blocks, count, overhead))
        answer |= {"gpu": count, "min_free_gpu_mb": _mb(multi_gpu.least(of_one, kind))}
        overhead = CUDA_LIBRARIES + min(weights, WEIGHTS_FILE) + ROWS_ON_THEIR_WAY
        answer["mem_mb"] = math.ceil(SPARE * _mb(found.host[kind])) + overhead
    else:
        answer["mem_mb"] = math.ceil(SPARE * _mb(found.host[kind])) + ROWS_ON_THEIR_WAY
    if _is_gguf(settings):  # converted once: dequantised in FP32, and written from there
        answer["load_mem_mb"] = answer["mem_mb"] + 2 * _mb(found.weights["fp32"])
    return answer


def _minutes(settings: Config, found: Estimate, store: str) -> dict[str, int]:
    speed, shards = sharding.tokens_per_second(settings), settings.extraction.shards or 1
    if speed is None or found.rows is None:
        return {name: UNKNOWN[name] for name in ("runtime", "verify_runtime")}
    loading, rows = found.weights["bf16"] / READING, found.rows * found.row_bytes[store] / READING
    sampled = settings.verify.documents * found.context_length / speed
    seconds = {
        "runtime": loading + found.rows / shards / speed,
        "verify_runtime": loading + rows + sampled,
    }
    return {name: STARTING + math.ceil(TIMES_PLANNED * s / 60) for name, s in seconds.items()}


def _gpu_speed(settings: Config) -> float:
    """Bytes that a program gets of one GPU: as the config says, else of the smallest that has the
    model's name.
    """
    if settings.resources.gpu_memory_gb is not None:
        return float(settings.resources.gpu_memory_gb) * 1e9
    requested = _plain(settings.resources.gpu_model or "")
    boards = [(_plain(g.name), g.usable_bytes) for g in gpu_specs.gpus()]
    sizes = [
        size
        for name, size in boards
        if requested and (name.startswith(requested) or requested.endswith(name))
    ]
    return min(sizes, default=ON_80_GB)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _is_gguf(settings: Config) -> bool:
    if settings.model.gguf_file is not None:
        return True
    try:
        return files.is_gguf(settings.model)
    except TheLoomError:
        return False  # which is said, with its reason, before any job runs


def _mb(size: float) -> int:
    return math.ceil(size / 1e6)


def table(runs: dict[str, Run]) -> str:
    """A sentence for each run: its shards, and what each of its jobs asks for."""
    said = []
    for run in runs.values():
        requested, shards = cast(Any, run.config["resources"]), run.config["extraction"]["shards"]
        tokens = run.config["corpus"]["max_tokens"]
        each = f" of about {math.ceil(tokens / shards):,} tokens" if tokens else ""
        model = f" {requested['gpu_model']}" if requested["gpu_model"] else ""
        gpus = (
            f"{requested['gpu']}{model} GPU{'s' * (requested['gpu'] != 1)}"
            if requested["gpu"]
            else "no GPU"
        )
        if requested["gpu"] and requested["min_free_gpu_mb"]:
            gpus += f" with {requested['min_free_gpu_mb'] / 1000:.1f} GB free"
        said.append(
            f"{run.name}: {shards} shards{each}; a job asks for {gpus}, {requested['threads']} threads, "
            f"{requested['mem_mb']:,} MB of memory, {requested['runtime']} minutes, {requested['disk_mb']:,} MB of disk"
        )
    return "\n".join(map(lines, said))
