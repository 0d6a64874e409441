"""What jobs ask of a scheduler: from the estimate, without torch, and kept for a run that has
begun.
"""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from support import ROOT
from theloom.config import compose, sharding
from theloom.config.frozen import freeze, to_config
from theloom.config.model_dims import dims_of_profile
from theloom.memory import closed_form
from theloom.model.weight_format import WeightFormat
from theloom.pipeline import resources

CONFIG = ROOT / "config"


def a_run(profile: str, overrides: str = "") -> compose.Run:
    (found,) = compose.runs(CONFIG, profile, overrides).values()
    return found


def requested(profile: str, overrides: str = "") -> resources.Resources:
    return resources.of(to_config(a_run(profile, overrides).config))


@pytest.mark.parametrize("profile", ["3b", "7b", "13b", "30b", "70b"])
def test_a_job_asks_for_gpus_that_hold_the_weights_and_for_host_memory_that_need_not(profile):
    found = requested(profile, "memory.quantization=null resources.gpu_memory_gb=80")
    size = dims_of_profile(to_config(a_run(profile).config).model.architecture)
    weights = closed_form.weights(size, WeightFormat("bf16"))
    assert weights < found.gpu * found.min_free_gpu_mb * 1e6 < 1.2 * weights + found.gpu * 2e9
    assert (found.gpu - 1) * 0.85 * 80e9 < weights
    assert found.mem_mb < 15_000


def test_on_the_cpu_the_host_holds_all_and_no_gpu_is_requested():
    found = requested("7b", "extraction.device=cpu memory.precision_mode=fp32")
    assert (found.gpu, found.min_free_gpu_mb, found.gpu_model) == (0, 0, None)
    assert found.mem_mb > 4 * 7000


def test_what_the_config_names_is_requested_as_it_is():
    found = requested(
        "7b", "resources.mem_mb=1 resources.runtime=2 resources.gpu=3 resources.disk_mb=4"
    )
    assert (found.mem_mb, found.runtime, found.verify_runtime, found.gpu, found.disk_mb) == (
        1,
        2,
        2,
        3,
        4,
    )


def test_a_model_without_numbers_gets_its_profile_s_figures():
    found = requested("custom", "model.source=a/b")
    assert (found.mem_mb, found.runtime, found.gpu) == (32_000, 240, 0)


def test_a_shard_s_disk_is_its_rows():
    found = requested("smollm2-135m", "extraction.shards=1 corpus.max_tokens=1000000")
    rows = 10**6 * (3 * 576 * 4 + 12) / 1e6
    assert rows < found.disk_mb < 1.11 * rows + 101


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
    assert resources._gpu_speed(settings) / (1 << 30) == pytest.approx(gpu, abs=0.01)


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


def begin(results, run: compose.Run) -> None:
    folder = results / run.name / "config"
    folder.mkdir(parents=True)
    freeze(run.stage("tokens"), folder / "tokens.json")


def test_a_run_that_has_begun_keeps_its_shards_until_its_corpus_changes(tmp_path):
    name = "name=r corpus.max_tokens=100000000"
    first = resources.planned(a_run("7b", f"{name} resources.gpu_model=a100"), tmp_path)
    begin(tmp_path, first)
    shards = first.config["extraction"]["shards"]
    other_gpu = a_run("7b", f"{name} resources.gpu_model=h100")
    assert other_gpu.config["extraction"]["shards"] < shards
    assert resources.planned(other_gpu, tmp_path).config["extraction"]["shards"] == shards
    longer = a_run("7b", "name=r corpus.max_tokens=900000000 resources.gpu_model=h100")
    assert resources.planned(longer, tmp_path).config["extraction"]["shards"] != shards
    said = a_run("7b", f"{name} extraction.shards=5")
    assert resources.planned(said, tmp_path).config["extraction"]["shards"] == 5


def test_the_dry_run_of_five_sizes_in_256_shards_lists_jobs_with_what_they_ask_for(project):
    done = project.snakemake(
        "--dry-run", profiles="3b,7b,13b,30b,70b", overrides="extraction.shards=256"
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count(": extract shard ") == 5 * 256
    for name in ("3b", "7b", "13b", "30b", "70b"):
        found = requested(name, "extraction.shards=256")
        assert (
            f"{name}+shards=256: 256 shards of about 3,907 tokens; a job asks for 1 GPU with"
            in printed
        )
        job = rf"{re.escape(name)}.shards=256: extract shard 00255 of 00256 \(\d+ threads, {found.mem_mb} MB, "
        assert re.search(rf"{job}{found.runtime} min\)", printed)


def test_planning_a_run_imports_no_torch():
    script = (
        "import sys; from pathlib import Path; from theloom.config import compose; from theloom.pipeline import resources\n"
        f"runs = compose.runs(Path({str(CONFIG)!r}), '70b')\n"
        "planned = {name: resources.planned(run, Path('none')) for name, run in runs.items()}\n"
        "print(resources.table(planned)); print('torch' in sys.modules, 'transformers' in sys.modules)"
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
