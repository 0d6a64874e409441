"""What jobs request from a scheduler: from the estimate, without torch, kept for a started run."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT, build_tiny
from theloom.config import compose, sharding
from theloom.config.frozen import freeze, load_frozen, to_config
from theloom.config.model_dims import dims_of_profile
from theloom.memory import closed_form
from theloom.model.weight_format import WeightFormat
from theloom.pipeline import resources
from theloom.planning import estimate

CONFIG = ROOT / "config"


def a_run(profile: str, overrides: str = "") -> compose.Run:
    (run,) = compose.runs(CONFIG, profile, overrides).values()
    return run


def requested(profile: str, overrides: str = "") -> resources.Resources:
    return resources.of(to_config(a_run(profile, overrides).config))


@pytest.mark.parametrize("profile", ["3b", "7b", "13b", "30b", "70b"])
def test_the_gpus_of_a_job_hold_the_weights_and_its_host_need_not(profile):
    request = requested(profile, "memory.quantization=null resources.gpu_memory_gb=80")
    size = dims_of_profile(to_config(a_run(profile).config).model.architecture)
    weights = closed_form.weights(size, WeightFormat("bf16"))
    assert weights < request.gpu * request.min_free_gpu_mb * 1e6 < 1.2 * weights + request.gpu * 2e9
    assert (request.gpu - 1) * 0.85 * 80e9 < weights
    assert request.mem_mb < 15_000


def test_on_the_cpu_the_host_holds_all_and_no_gpu_is_requested():
    request = requested("7b", "extraction.device=cpu memory.precision_mode=fp32")
    assert (request.gpu, request.min_free_gpu_mb, request.gpu_model) == (0, 0, None)
    assert request.mem_mb > 4 * 7000


def test_what_the_config_names_is_requested_as_it_is():
    request = requested(
        "7b", "resources.mem_mb=1 resources.runtime=2 resources.gpu=3 resources.disk_mb=4"
    )
    assert (
        request.mem_mb,
        request.runtime,
        request.verify_runtime,
        request.gpu,
        request.disk_mb,
    ) == (
        1,
        2,
        2,
        3,
        4,
    )


@pytest.mark.parametrize("overrides", ["", "memory.quantization=null"])
def test_a_larger_model_requests_no_less_host_memory(overrides):
    sizes = [requested(p, overrides).mem_mb for p in ("smollm2-135m", "3b", "7b", "13b", "30b")]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= requested("70b", overrides).mem_mb


def test_a_job_without_a_gpu_requests_the_host_memory_of_the_whole_model():
    on_cpu = requested("7b", "extraction.device=cpu")
    assert requested("7b", "resources.gpu=0") == on_cpu


def test_an_unknown_model_waits_for_its_estimate():
    request = requested("custom", "model.source=a/b")
    assert (request.mem_mb, request.runtime, request.disk_mb, request.gpu) == (None, None, None, 0)
    (sentence,) = resources.table({"x": a_planned("custom", "model.source=a/b")}).split("\n\n")
    assert "4 threads; the rest follows from estimate.h5" in " ".join(sentence.split())


def a_planned(profile: str, overrides: str) -> compose.Run:
    return resources.planned(a_run(profile, overrides), Path("none"))


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Path, compose.Run]:
    """A tiny GPT-2, which the closed form does not cover, and the results with its estimate."""
    folder = tmp_path_factory.mktemp("traced")
    model = build_tiny("gpt2", folder / "model")
    overrides = f"name=run model.source={model} corpus.max_tokens=1000"
    run = a_run("custom", f"{overrides} memory.streaming_chunk_size=64")
    (folder / "results/run").mkdir(parents=True)
    freeze(run.stage("estimate"), folder / "estimate.json")
    config = load_frozen(folder / "estimate.json")
    estimate.run_estimate(config, folder / "results/run/estimate.h5")
    return folder / "results", run


def test_an_unknown_model_is_planned_by_its_trace(traced):
    results, run = traced
    request = resources.planned(run, results).config["resources"]
    assert 450 < request["mem_mb"] == request["load_mem_mb"] < 2000
    assert resources.STARTING < request["runtime"] <= request["verify_runtime"] < 20
    assert 100 < request["disk_mb"] < 110
    assert "MB of memory, 11 minutes" in " ".join(
        resources.table({"run": resources.planned(run, results)}).split()
    )


def test_on_gpus_the_trace_plans_their_number_and_memory(traced):
    results, run = traced
    changed = replace(
        run, config=run.config | {"resources": run.config["resources"] | {"gpu": None}}
    )
    request = resources.planned(changed, results).config["resources"]
    assert request["gpu"] == 1
    assert 500 < request["min_free_gpu_mb"] < 2000
    assert request["mem_mb"] > resources.CUDA_LIBRARIES


def test_an_estimate_of_another_config_is_not_read(traced):
    results, run = traced
    assert resources.own_estimate(run, results) is not None
    memory = run.config["memory"] | {"streaming_chunk_size": 32}
    other = replace(run, config=run.config | {"memory": memory})
    assert resources.own_estimate(other, results) is None
    assert resources.planned(other, results).config["resources"]["mem_mb"] is None


def test_a_run_is_planned_again_once_when_its_estimate_appears(traced, tmp_path):
    results, run = traced
    planner = resources.Planner(tmp_path)
    first = planner.plan(run)
    assert planner.waits(first)
    assert planner.renewed(first) is None
    (tmp_path / "run").mkdir()
    shutil.copy(results / "run/estimate.h5", tmp_path / "run")
    assert not planner.waits(first)
    second = planner.renewed(first)
    assert second == resources.planned(run, results)
    assert planner.renewed(second) is None


def test_a_dry_run_on_slurm_shows_the_threads_of_the_plan(project):
    done = project.snakemake("-n", "--profile", "workflow/profiles/slurm", profiles="7b")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "free, 8 threads, " in " ".join(printed.split())
    assert printed.count("(8 threads, ") == 4
    assert "(1 threads" not in printed


def test_a_shard_s_disk_is_its_rows():
    request = requested("smollm2-135m", "extraction.shards=1 corpus.max_tokens=1000000")
    rows = 10**6 * (3 * 576 * 4 + 12) / 1e6
    assert rows < request.disk_mb < 1.11 * rows + 101


@pytest.mark.parametrize(
    ("overrides", "gpu"),
    [
        ("a100", 39.39),
        ("nvidia_a100_80gb", 79.14),
        ("l4", 22.03),
        ("unheard-of", 73.67),
        ("l40s", 44.34),
    ],
)
def test_a_scheduler_s_name_of_a_gpu_gives_its_memory(overrides, gpu):
    settings = to_config(a_run("7b", f"resources.gpu_model={overrides}").config)
    assert resources._smallest_gpu(settings)[0] / (1 << 30) == pytest.approx(gpu, abs=0.01)


def test_shards_are_ten_minutes_of_the_planned_throughput():
    overrides = "corpus.max_tokens=100000000 resources.gpu_model=a100"
    settings = to_config(a_run("7b", overrides).config)
    speed = sharding.tokens_per_second(settings)
    assert 100_000_000 / settings.extraction.shards / speed == pytest.approx(600, rel=0.1)
    faster = a_run("7b", f"{overrides} resources.tokens_per_second={2 * speed}")
    assert faster.config["extraction"]["shards"] == pytest.approx(
        settings.extraction.shards / 2, abs=1
    )


def test_there_is_a_shard_for_each_gpu_that_shall_work():
    assert a_run("3b", "resources.min_shards=8").config["extraction"]["shards"] == 8
    assert (
        a_run("3b", "resources.min_shards=8 extraction.shards=3").config["extraction"]["shards"]
        == 3
    )


def test_a_large_model_is_loaded_once_for_several_shards(tmp_path):
    overrides = "memory.quantization=null corpus.max_tokens=100000000 resources.gpu_model=a100"
    run = resources.planned(a_run("70b", overrides), tmp_path)
    shards, per_job = run.config["extraction"]["shards"], run.config["resources"]["shards_per_job"]
    assert 15 < per_job < shards / 2  # 143 GB at 0.2 GB/s, for shards of ten minutes
    alone = resources.planned(a_run("70b", f"{overrides} resources.shards_per_job=1"), tmp_path)
    longer = run.config["resources"]["runtime"] / alone.config["resources"]["runtime"]
    assert per_job / 4 < longer < per_job
    many = resources.planned(a_run("70b", f"{overrides} resources.min_shards=60"), tmp_path)
    assert shards // many.config["resources"]["shards_per_job"] >= 60
    cut = resources.planned(a_run("70b", f"{overrides} extraction.shards=500"), tmp_path)
    assert cut.config["resources"]["shards_per_job"] == 1  # whoever names jobs gets them


def begin(results, run: compose.Run) -> None:
    folder = results / run.name / "config"
    folder.mkdir(parents=True)
    freeze(run.stage("tokens"), folder / "tokens.json")


def test_a_started_run_keeps_its_shards_until_its_corpus_changes(tmp_path):
    name = "name=r corpus.max_tokens=100000000"
    first = resources.planned(a_run("7b", f"{name} resources.gpu_model=a100"), tmp_path)
    begin(tmp_path, first)
    shards = first.config["extraction"]["shards"]
    other_gpu = a_run("7b", f"{name} resources.gpu_model=h100")
    assert other_gpu.config["extraction"]["shards"] < shards
    assert resources.planned(other_gpu, tmp_path).config["extraction"]["shards"] == shards
    longer = a_run("7b", "name=r corpus.max_tokens=900000000 resources.gpu_model=h100")
    assert resources.planned(longer, tmp_path).config["extraction"]["shards"] != shards
    explicit = a_run("7b", f"{name} extraction.shards=5")
    assert resources.planned(explicit, tmp_path).config["extraction"]["shards"] == 5


def test_a_dry_run_of_five_sizes_lists_what_each_job_requests(project):
    done = project.snakemake(
        "--dry-run", profiles="3b,7b,13b,30b,70b", overrides="extraction.shards=256"
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count(": extract shard ") == 5 * 256
    for name in ("3b", "7b", "13b", "30b", "70b"):
        request = requested(name, "extraction.shards=256")
        assert (
            f"{name}+shards=256: 256 shards of about 3,907 tokens; a job requests 1 GPU with"
            in printed
        )
        job = rf"{re.escape(name)}.shards=256: extract shard 00255 of 00256 "
        job += rf"\(\d+ threads, {request.mem_mb} MB, "
        assert re.search(rf"{job}{request.runtime} min\)", printed)


def test_planning_a_run_imports_no_torch():
    script = (
        "import sys; from pathlib import Path; from theloom.config import compose\n"
        "from theloom.pipeline import resources\n"
        f"runs = compose.runs(Path({str(CONFIG)!r}), '70b')\n"
        "planned = {name: resources.planned(run, Path('none')) for name, run in runs.items()}\n"
        "print(resources.table(planned))\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_what_is_frozen_for_jobs_on_a_cluster_is_plain_and_whole(tmp_path):
    run = resources.planned(a_run("7b"), tmp_path)
    frozen = json.loads(json.dumps(run.stage("resources")))["config"]["resources"]
    assert {f.name for f in dataclasses.fields(resources.Resources)} <= set(frozen)
    assert frozen["gpu"] == 1
