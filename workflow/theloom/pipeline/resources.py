"""What the jobs of a run request from a scheduler: threads, memory, time, disk and GPUs.

The figures come from the run's `estimate.h5` once it exists. Before that, the closed form gives
the same figures for Llama-like models whose profile has their dimensions. For any other model they
stay open (None) until `estimate_memory` has traced it: Snakemake evaluates a job's resources again
when the job's inputs are there. Nothing here imports torch, and a plan takes milliseconds.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from theloom.config import sharding
from theloom.config.auto import store_precision
from theloom.config.compose import Run
from theloom.config.frozen import to_config, to_plain
from theloom.config.model_dims import ModelDims, dims_of_profile
from theloom.config.schema import Config
from theloom.devices import gpu_specs
from theloom.errors import TheLoomError
from theloom.memory import closed_form
from theloom.memory.estimators import ClosedForm
from theloom.memory.sizes import Components
from theloom.model import files, weight_format
from theloom.model.weight_format import WeightFormat
from theloom.planning import answers_plan, disk, estimate, multi_gpu
from theloom.planning.estimates import estimate_file, run_models
from theloom.planning.estimates.estimate_file import Estimate
from theloom.store import file_format, provenance, ring_buffer
from theloom.terminal import lines

# Host memory of a GPU job on top of the estimate, MB: what CUDA's libraries map, the pages of the
# weights file that is being read (hub models come in files of at most 5 GB), and rows on their way
# to the disk.
CUDA_LIBRARIES, WEIGHTS_FILE, ROWS_IN_TRANSIT = 3000, 5000, 400

# The loader has several tensors in flight. Their size is taken as a share of the weights, so that
# a larger model never requests less than a smaller one whose embedding happens to be larger.
TENSORS_IN_FLIGHT, MOST_IN_FLIGHT = 1 / 16, 2500  # of the weights; MB

SPARE = 1.15  # of host memory: allocators keep more than is requested of them

UNSIZED_ANSWERS = {"sample_runtime": 240, "sample_disk_mb": 1000}  # no max_documents
UNSIZED_CORPUS = {"runtime": 240, "verify_runtime": 240, "disk_mb": 10_000}  # no max_tokens

# Where no estimate can be read when a job is submitted, e.g. from an object store
WITHOUT_ESTIMATE: dict[str, int] = {
    "mem_mb": 32_000,
    "load_mem_mb": 32_000,
    "min_free_gpu_mb": 0,
    **UNSIZED_CORPUS,
    **UNSIZED_ANSWERS,
}

STARTING = 10  # minutes: a scheduler's prologue, imports from a network file system

SAFETY_FACTOR = 3  # a time limit is three times the planned time

ON_80_GB = 79.1e9  # bytes that programs get of such a GPU


@dataclass(frozen=True)
class Resources:
    """What each job that holds the model requests. MB are 10⁶ bytes, `runtime` minutes.

    `gpu_model` and `constraint` are None where nothing is requested, all others where the figure
    is not known before `estimate.h5` exists.
    """

    threads: int
    mem_mb: int | None
    load_mem_mb: int | None
    runtime: int | None
    verify_runtime: int | None
    sample_runtime: int | None
    sample_disk_mb: int | None
    disk_mb: int | None
    gpu: int
    gpu_model: str | None
    min_free_gpu_mb: int | None
    constraint: str | None


def planned(run: Run, results: Path) -> Run:
    """Fill in every key of `resources` that a run's config leaves open.

    A started run over the same corpus keeps its number of shards, even if the planned throughput
    has changed since.

    Args:
        run: The run as it was composed.
        results: The folder of all runs, usually `results`.

    Returns:
        The run with its resources and its number of shards.

    Raises:
        MemoryPlanError: No machine has enough GPUs for the model.
    """
    kept = _started_shards(run, results) if run.shards_left_open else None
    settings: dict[str, Any] = run.config
    if kept is not None:
        settings = settings | {"extraction": settings["extraction"] | {"shards": kept}}
    run = replace(run, config=settings)  # whose frozen configs are compared
    if (jobs := _tokenized_by(run, results)) != 0:
        settings = settings | {"resources": settings["resources"] | {"tokenize_jobs": jobs}}
    run = replace(run, config=settings)
    if settings["resources"]["shards_per_job"] is None:
        per_job = _started_per_job(run, results)
        if per_job is None:
            count = settings["extraction"]["shards"]
            left_open = run.shards_left_open
            per_job = sharding.shards_per_job(to_config(settings), count) if left_open else 1
        settings = settings | {"resources": settings["resources"] | {"shards_per_job": per_job}}
    request = of(to_config(settings), own_estimate(run, results))
    return replace(run, config=settings | {"resources": settings["resources"] | asdict(request)})


class Planner:
    """Plans the runs of a call, and plans a run again when its `estimate.h5` appears.

    Args:
        results: The folder of all runs.
    """

    def __init__(self, results: Path) -> None:
        self._results = results
        self._open: dict[str, dict[str, Any]] = {}  # by run: resources as its config names them
        self._read: dict[str, int] = {}  # by run: when the estimate that was read was written, ns

    def plan(self, run: Run) -> Run:
        """`planned`, remembered for `renewed` where the closed form does not hold.

        Args:
            run: The run, with the resources that its config names.

        Returns:
            The run with the resources of its jobs; None stands for what is not known yet.
        """
        if _covered(to_config(run.config)) is None:
            self._open[run.name] = run.config["resources"]
            self._read[run.name] = self._written(run)
        return planned(run, self._results)

    def renewed(self, run: Run) -> Run | None:
        """The planned run with other resources, once its estimate is there.

        A look at the file's time, so that Snakemake may call it for each resource of each job.

        Args:
            run: As `plan` gave it.

        Returns:
            The run; None where no estimate came since the last plan.
        """
        if run.name not in self._open or self._written(run) == self._read[run.name]:
            return None
        self._read[run.name] = self._written(run)
        kept = {n: run.config["resources"][n] for n in ("tokenize_jobs", "shards_per_job")}
        settings = run.config | {"resources": self._open[run.name] | kept}
        request = asdict(of(to_config(settings), own_estimate(run, self._results)))
        return replace(run, config=settings | {"resources": settings["resources"] | request})

    def waits(self, run: Run) -> bool:
        """Whether the run's estimate is not made yet.

        Args:
            run: The run.

        Returns:
            True where there is no `estimate.h5`.
        """
        return self._written(run) == 0

    def _written(self, run: Run) -> int:
        try:
            return (self._results / run.name / "estimate.h5").stat().st_mtime_ns
        except OSError:
            return 0


def _frozen(folder: Path, stage: str) -> dict[str, Any] | None:
    """The config of a stage that a run has left in its folder."""
    try:
        file = (folder / "config" / f"{stage}.json").read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(file)["config"]
    except (OSError, ValueError, KeyError):
        return None
    return config


def _started_shards(run: Run, results: Path) -> int | None:
    if (before := _frozen(results / run.name, "tokens")) is None:
        return None
    now = run.stage("tokens")["config"]
    same = {k: v for k, v in before.items() if k != "extraction"} == {
        k: v for k, v in now.items() if k != "extraction"
    }
    return int(before["extraction"]["shards"]) if same else None


def _started_per_job(run: Run, results: Path) -> int | None:
    """The shards of a job of a run that has some: with others Snakemake would extract finished ones
    again, beside those that are missing. None: there is no shard of these.
    """
    folder, count = results / run.name, run.config["extraction"]["shards"]
    before = _frozen(folder, "resources")
    if before is None or not any((folder / "shards").glob(f"*-of-{count:05d}.h5*")):
        return None
    return int(before["resources"].get("shards_per_job") or 1)


def _tokenized_by(run: Run, results: Path) -> int | None:
    """The jobs by which a run's `tokens.h5` came, as its config names them: with others Snakemake
    would tokenise it again. 0: there is none, or of another corpus.
    """
    folder, now = results / run.name, run.stage("tokens")["config"]
    if not (folder / "tokens.h5").exists() or _frozen(folder, "tokens") != now:
        return 0
    before = _frozen(folder, "resources") or {"resources": {}}
    jobs: int | None = before["resources"].get("tokenize_jobs")
    return jobs


def own_estimate(run: Run, results: Path) -> Estimate | None:
    """The run's `estimate.h5`.

    Args:
        run: The run.
        results: The folder of all runs.

    Returns:
        What it holds; None where there is none, it cannot be read, or another config made it.
    """
    path = results / run.name / "estimate.h5"
    try:
        with file_format.open_h5(path, "estimate") as file:
            made_by = json.loads(file.attrs["config"])
        config = to_plain(to_config(run.stage("estimate")["config"]))
        if made_by != json.loads(json.dumps(provenance.without_home(config))):
            return None
        return estimate_file.read(path)
    except (OSError, KeyError, ValueError, TheLoomError):
        return None


def of(settings: Config, estimated: Estimate | None = None) -> Resources:
    """The resources of a run's jobs.

    Args:
        settings: The run's config.
        estimated: The run's estimate where it exists, else the closed form is used if it holds.

    Returns:
        What the config names, and for the rest what the estimate gives.

    Raises:
        MemoryPlanError: No machine has enough GPUs for the model.
    """
    requested = settings.resources
    if requested.gpu == 0:  # such a job runs on the CPU, whatever extraction.device allows
        cpu = OmegaConf.create({"extraction": {"device": "cpu"}})
        settings = cast(Config, OmegaConf.merge(cast(Any, settings), cpu))
    on_gpu, plan = settings.extraction.device != "cpu", dict[str, Any]()
    if estimated is None and (size := _covered(settings)) is not None:
        estimated = estimate.estimate(settings, ClosedForm(size), "cuda" if on_gpu else "cpu")
    if estimated is not None:
        plan = _from_estimate(settings, estimated, on_gpu)
    mem_mb = requested.mem_mb or plan.get("mem_mb")
    load_mem_mb = max(mem_mb, plan.get("load_mem_mb", 0)) if mem_mb else None
    gpu = requested.gpu if requested.gpu is not None else plan.get("gpu", int(on_gpu))
    return Resources(
        threads=requested.threads,
        mem_mb=mem_mb,
        load_mem_mb=requested.load_mem_mb or load_mem_mb,
        runtime=requested.runtime or plan.get("runtime"),
        verify_runtime=requested.verify_runtime or requested.runtime or plan.get("verify_runtime"),
        sample_runtime=requested.sample_runtime or requested.runtime or plan.get("sample_runtime"),
        sample_disk_mb=requested.sample_disk_mb or plan.get("sample_disk_mb"),
        disk_mb=requested.disk_mb or plan.get("disk_mb"),
        gpu=gpu,
        gpu_model=requested.gpu_model if gpu else None,
        min_free_gpu_mb=requested.min_free_gpu_mb or (plan.get("min_free_gpu_mb") if gpu else 0),
        constraint=requested.constraint,
    )


def _covered(settings: Config) -> ModelDims | None:
    """The model's dimensions if the closed form holds for all that is requested."""
    declared = settings.model.architecture
    if declared is None or settings.extraction.attention.name == "eager":
        return None
    size = dims_of_profile(declared)
    if not closed_form.covers(size):
        return None
    estimator = ClosedForm(size)
    points = estimator.catalog().select(settings.memory.activation_cache_filter)
    return size if estimator.covers(points) else None


def _from_estimate(settings: Config, estimated: Estimate, on_gpu: bool) -> dict[str, Any]:
    precision = run_models.likely_precision(settings)
    kind = _weight_format(settings, estimated, precision)
    store = store_precision(settings, precision)
    plan: dict[str, Any] = (
        UNSIZED_CORPUS | UNSIZED_ANSWERS | _minutes(settings, estimated, store, kind)
    )
    shards = settings.extraction.shards or 1
    if estimated.rows is not None:
        needed = estimated.disk_bytes(store) or 0
        plan["disk_mb"] = 100 + _mb(1.1 * needed / shards)
    if estimated.answers_disk is not None:
        lines_of_tokens = disk.LINE * (estimated.answers_tokens or 0)
        of_shard = (estimated.answers_disk + lines_of_tokens) / shards
        plan["sample_disk_mb"] = 100 + _mb(1.1 * of_shard)
    weights = _mb(estimated.weights[kind])
    host = _host_bytes(estimated, kind, on_gpu)
    if (sampled := _sampling(settings, estimated, kind)) and not on_gpu:
        host = max(host, estimate.HOST_PROCESS + sampled.total)
    if on_gpu:
        # The largest tensor is the embedding, which is on the first GPU with its blocks.
        embedding, blocks = _largest_tensor(estimated), estimated.blocks
        overhead = min(1.0, embedding / estimated.weights[kind])
        size, capability = _smallest_gpu(settings)
        budget = settings.memory.memory_warning_threshold * size
        count = settings.resources.gpu or multi_gpu.gpus_for(
            estimated, kind, blocks, overhead, budget, capability
        )
        fullest = multi_gpu.of_one(estimated, multi_gpu.share(blocks, count, overhead))
        least = multi_gpu.least(fullest, kind, capability)
        if sampled:
            least = max(least, sampled.total // count)
        plan |= {"gpu": count, "min_free_gpu_mb": _mb(least)}
        copied = estimate.copied_precision(settings, precision)
        host += multi_gpu.ring_growth(estimated, estimated.row_bytes[copied], count)
        in_flight = min(MOST_IN_FLIGHT, math.ceil(TENSORS_IN_FLIGHT * weights)) - _mb(embedding)
        host_mb = math.ceil(SPARE * (_mb(host) + max(0, in_flight)))
        plan["mem_mb"] = host_mb + CUDA_LIBRARIES + min(weights, WEIGHTS_FILE) + ROWS_IN_TRANSIT
    else:
        plan["mem_mb"] = math.ceil(SPARE * _mb(host)) + ROWS_IN_TRANSIT
    if _is_gguf(settings):  # converted once: dequantised in FP32, and written from there
        plan["load_mem_mb"] = plan["mem_mb"] + 2 * _mb(estimated.weights["fp32"])
    return plan


def _sampling(settings: Config, estimated: Estimate, kind: str) -> Components | None:
    """What one answer takes, where the run's own model samples answers."""
    if (size := estimated.answers.get(kind)) is None:
        return None
    prompt = answers_plan.longest_prompt(settings, estimated.context_length)
    return size.components(1, prompt, settings.answers.max_new_tokens, estimated.device)


def _weight_format(settings: Config, estimated: Estimate, precision: str) -> str:
    """The name of the run's weight format, which a quantised checkpoint sets by itself."""
    for quantization in ("int8", "int4"):
        # only estimates of quantised weights have passes with FP32 around them
        if f"{quantization}+fp32" in estimated.passes:
            return WeightFormat(precision, quantization).name
    return weight_format.weight_format_of(settings, precision).name


def _largest_tensor(estimated: Estimate) -> int:
    """Bytes of the largest tensor, which an estimate counts on top of quantised weights."""
    return estimated.load_peak["int8"] - estimated.weights["int8"]


def _host_bytes(estimated: Estimate, kind: str, on_gpu: bool) -> int:
    """Host memory of a job: the estimate's, unless that is for a GPU and the job has none."""
    if on_gpu or estimated.device == "cpu":
        return estimated.host[kind]
    passes = [p for p in estimated.passes[kind] if p.chunk_size == estimated.chunk_size]
    forward = max(p.parts.total for p in passes)
    weights = estimated.weights[kind]
    return estimate.HOST_PROCESS + weights + forward + ring_buffer.bytes_on_device("cpu", 0)


def _minutes(settings: Config, estimated: Estimate, store: str, kind: str) -> dict[str, int]:
    bf16 = estimated.weights["bf16"]
    block_parameters = max(0, bf16 - _largest_tensor(estimated)) // 2
    speed = sharding.tokens_per_second(settings, block_parameters)
    tokens, shards = disk.most_tokens(settings), settings.extraction.shards or 1
    if speed is None or tokens is None:
        return {}
    rows = tokens if estimated.rows is None else estimated.rows
    loading, reading = (
        size / sharding.READING for size in (bf16, rows * estimated.row_bytes[store])
    )
    documents = settings.verify.documents
    sampled = documents * estimated.context_length / speed
    checking, computing = sharding.verification_jobs(settings.verify.jobs, shards, documents)
    seconds = {
        "runtime": loading + tokens * (settings.resources.shards_per_job or 1) / shards / speed,
        "verify_runtime": loading + reading / checking + sampled / computing,
    }
    if (least := estimated.answers_seconds.get(kind)) is not None:  # of tokens, each in a pass
        seconds["sample_runtime"] = loading + (least + tokens / speed) / shards
    return {name: _time_limit(s) for name, s in seconds.items()}


def _time_limit(seconds: float) -> int:
    """Minutes that a job of so many planned seconds may take."""
    return STARTING + math.ceil(SAFETY_FACTOR * seconds / 60)


def _smallest_gpu(settings: Config) -> tuple[float, tuple[int, int] | None]:
    """Bytes that a program gets of one GPU, and its compute capability: of the smallest with the
    model's name. The config's size goes before; None: the capability is not known.
    """
    boards = gpu_specs.find(settings.resources.gpu_model or "")
    smallest = min(boards, key=lambda gpu: gpu.usable_bytes, default=None)
    size = ON_80_GB if smallest is None else smallest.usable_bytes
    if settings.resources.gpu_memory_gb is not None:
        size = float(settings.resources.gpu_memory_gb) * 1e9
    return size, None if smallest is None else smallest.compute_capability


def _is_gguf(settings: Config) -> bool:
    if settings.model.gguf_file is not None:
        return True
    try:
        return files.is_gguf(settings.model)
    except TheLoomError:
        return False  # preflight reports it, with its reason


def _mb(size: float) -> int:
    return math.ceil(size / 1e6)


def table(runs: dict[str, Run]) -> str:
    """A sentence for each run: its shards, and what each of its jobs requests.

    Args:
        runs: Planned runs by name.

    Returns:
        The sentences, in lines of one text.
    """
    return "\n".join(lines(_sentence(run)) for run in runs.values())


def _sentence(run: Run) -> str:
    request, shards = cast(Any, run.config["resources"]), run.config["extraction"]["shards"]
    tokens = run.config["corpus"]["max_tokens"]
    each = f" of about {math.ceil(tokens / shards):,} tokens" if tokens else ""
    model = f" {request['gpu_model']}" if request["gpu_model"] else ""
    gpus = (
        f"{request['gpu']}{model} GPU{'s' * (request['gpu'] != 1)}" if request["gpu"] else "no GPU"
    )
    if request["gpu"] and request["min_free_gpu_mb"]:
        gpus += f" with {request['min_free_gpu_mb'] / 1000:.1f} GB free"
    per_job = request["shards_per_job"]
    together = "" if per_job == 1 else f", and extracts {per_job} shards with one model"
    figures = {
        "MB of memory": request["mem_mb"],
        "minutes": request["runtime"],
        "MB of disk": request["disk_mb"],
    }
    known = [f"{value:,} {unit}" for unit, value in figures.items() if value is not None]
    text = f"{run.name}: {shards} shards{each}; a job requests "
    text += ", ".join([gpus, f"{request['threads']} threads", *known])
    text += together
    if len(known) < len(figures):
        text += "; the rest follows from estimate.h5, which the run makes first"
    return text
