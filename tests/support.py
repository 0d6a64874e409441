"""Builders that the tests share: a config for any model, tiny real models, a run without snakemake,
and one with it.
"""

import gc
import mmap
import multiprocessing
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType

import preloading
import torch
from corpus_support import byte_tokenizer
from theloom.answers import gather
from theloom.answers.shard import sample_answers
from theloom.config import compose, frozen
from theloom.config.schema import Config
from theloom.corpus import tokens
from theloom.dataset.merge import merge_shards
from theloom.hooks.blocks import Architecture
from theloom.hooks.catalog import build_catalog
from theloom.hooks.points import HookPoint, residual_points
from theloom.hooks.taps import Taps
from theloom.model.forward import prefill
from theloom.pipeline import extract_shard, load_model
from theloom.planning import estimate
from theloom.store import writer
from theloom.verification.verify import verify_run
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]


def a_config(model_source: str | Path, overrides: str = "") -> Config:
    """The whole config of a run on the CPU, with any model."""
    device = "" if "extraction.device=" in overrides else "extraction.device=cpu"
    runs = compose.runs(
        ROOT / "config", "custom", f"model.source={model_source} {device} {overrides}"
    )
    (run,) = runs.values()
    return frozen.to_config(run.config)


TINY = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96},
    "gpt_neox": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "phi": {},
    "olmo2": {},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def build_tiny(model_type: str, folder: Path, **numbers: int) -> Path:
    """A three-block model with random weights, saved as `from_pretrained` loads it.

    Weights are scaled by 1/√fan-in, since the usual 0.02 would hide errors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 256,
    }
    if not hasattr(AutoConfig.for_model(model_type), "num_key_value_heads"):
        del common["num_key_value_heads"]
    model_config = AutoConfig.for_model(
        model_type, **{**common, **TINY.get(model_type, {}), **numbers}
    )
    model = AutoModelForCausalLM.from_config(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def with_bytes(folder: Path) -> Path:
    """A model's folder, to which a tokenizer of bytes is added."""
    byte_tokenizer(folder)
    return folder


@dataclass(frozen=True)
class Stages:
    """A run whose stages a test calls by itself, without snakemake."""

    folder: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("shards/*.h5"))

    @property
    def activations(self) -> Path:
        return self.folder / "activations.h5"

    def config(self, stage: str) -> Config:
        return frozen.load_frozen(self.folder / f"{stage}.json")

    def prepare(self) -> None:
        """All stages before the extraction."""
        estimate.run_estimate(self.config("estimate"), self.folder / "estimate.h5")
        tokens.tokenize(self.config("tokens"), self.folder / "tokens.h5")
        self.answer()
        files = (self.folder / "estimate.h5", self.documents, self.folder / "model.h5")
        load_model.record(self.config("model"), *files)

    @property
    def documents(self) -> Path:
        """The tokens that are extracted."""
        answered = self.config("answers").answers.source is not None
        return self.folder / ("answers.h5" if answered else "tokens.h5")

    def answer(self) -> None:
        """The answers to the documents, where the run has some."""
        config = self.config("answers")
        if config.answers.source is None:
            return
        count, found = config.extraction.shards, []
        for number in range(count) if config.answers.source.name == "model" else ():
            found.append(self.sample(number))
        gather.gather(config, self.folder / "tokens.h5", found, self.folder / "answers.h5")

    def sample(self, number: int) -> Path:
        """The answers of a shard."""
        count = self.config("answers").extraction.shards
        output = self.folder / f"answers/{number:05d}-of-{count:05d}.h5"
        output.parent.mkdir(exist_ok=True)
        names = ("sample.json", "estimate.h5", "tokens.h5")
        sample_answers(*(self.folder / name for name in names), number, output)
        return output

    def extract(self, *numbers: int) -> None:
        """The shards of these numbers; by default all."""
        count = self.config("merge").extraction.shards
        for number in numbers or range(count):
            extract_shard.extract_shard(
                self.folder / "extract.json",
                self.folder / "estimate.h5",
                self.folder / "model.h5",
                self.documents,
                number,
                self.folder / f"shards/{number:05d}-of-{count:05d}.h5",
            )

    def merge(self) -> None:
        merge_shards(self.shards, self.config("merge").store.merge.name, self.activations)

    def verify(self) -> None:
        output = self.folder / "verification.h5"
        verify_run(self.config("verify"), self.activations, self.folder / "model.h5", output)

    def all(self) -> "Stages":
        self.prepare()
        self.extract()
        self.merge()
        return self


def stages(folder: Path, model_source: str | Path, overrides: str = "") -> Stages:
    """The frozen configs of a small run of any model over real text."""
    small = {
        "memory.streaming_chunk_size": 64,
        "memory.activation_cache_filter": "[blocks.*.hook_resid_pre,blocks.*.hook_resid_post]",
        "extraction.batch_tokens": 256,
        "corpus.max_tokens": 2000,
        "extraction.device": "cpu",
    }
    requested = dict(o.partition("=")[::2] for o in overrides.split())
    corpus = {k for k in requested if k.startswith("corpus")}
    tokens_taken = requested.get("corpus.max_tokens", "2000")
    few = tokens_taken.isdigit() and int(tokens_taken) <= 2000
    if few and corpus <= {"corpus.context_length", "corpus.max_tokens"}:
        small["corpus.max_documents"] = 16  # enough for so many tokens: 64 are encoded together
    defaults = " ".join(f"{key}={value}" for key, value in small.items() if key not in requested)
    overrides = f"model.source={model_source} {defaults} {overrides}"
    (run,) = compose.runs(ROOT / "config", "custom", overrides).values()
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for stage in frozen.STAGES:
        frozen.freeze(run.stage(stage), folder / f"{stage}.json")
    return Stages(folder)


def extract_one_shard(run: Stages, oom_level: int = 0) -> None:
    """The only shard of a run, as a job after so many that ran out of memory."""
    names = ("extract.json", "estimate.h5", "model.h5", "tokens.h5")
    output = run.folder / "shards/00000-of-00001.h5"
    extract_shard.extract_shard(
        *(run.folder / name for name in names), 0, output, oom_level=oom_level
    )


def extract_with_small_commits(folder: Path) -> None:
    """The extraction of a run, committed every 16 KiB: the body of a job that a test kills."""
    torch.set_num_threads(1)  # as the tests themselves: sums depend on how they are split
    writer.COMMIT_BYTES = 1 << 14
    Stages(folder).extract()


def forking() -> ForkServerContext:
    """Processes of a server that has imported what all of them import, since one that imports torch
    by itself takes seconds before it begins. They get pickles alone, as those that are spawned.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["forked_jobs"])  # heeded before the first job alone
    return processes


def forked(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Start a job that a test kills."""
    started = forking().Process(target=target, args=arguments)
    started.start()
    return started


def touch(size: int) -> None:
    """Have so many more bytes resident for a moment: mapped anew, since malloc may have as many
    left from before.
    """
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1


def lines_run(work: Callable[[], object], folder: str) -> int:
    """How many lines of the library's files below a folder run while a work is done."""
    count = 0

    def count_lines(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        nonlocal count
        count += event == "line"
        return count_lines

    def enter(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        return count_lines if f"theloom/{folder}" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def peak_of(work: Callable[..., object], *arguments: object) -> int:
    """The most bytes of Python's and NumPy's that were there at once."""
    tracemalloc.start()
    try:
        work(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def allocator_peak(work: Callable[[], object], warm_up: bool = True) -> int:
    """The most bytes that the CPU allocator had given out at once, above what it had before:
    torch's profiler tells. Without `warm_up`, the same kernels have run before.
    """
    if warm_up:
        work()  # what libraries allocate once is not the work's
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def residuals_of(described: Architecture) -> list[HookPoint]:
    """The residual stream before and after every block."""
    return residual_points(len(described.blocks), described.hidden_size)


def values_of(
    described: Architecture, ids: torch.Tensor, **inputs: object
) -> dict[str, torch.Tensor]:
    """Every hook point of a model, by name, in one pass over ids (batch, position)."""
    found: dict[str, torch.Tensor] = {}
    taps = Taps(
        described,
        build_catalog(described).points,
        lambda name, value: found.__setitem__(name, value.clone()),
    )
    with torch.no_grad(), taps:
        taps.run(input_ids=ids, use_cache=False, **inputs)
    return found


def chunks_of(
    described: Architecture, ids: torch.Tensor, chunk_size: int
) -> dict[str, torch.Tensor]:
    """The same in chunks through the KV cache, put together again."""
    points = {p.name: p for p in build_catalog(described).points}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in points}
    with Taps(
        described, list(points.values()), lambda name, value: found[name].append(value.clone())
    ) as taps:
        prefill(taps, ids, chunk_size)

    def together(point: HookPoint) -> torch.Tensor:
        chunks = found[point.name]
        if point.over_keys:
            keys = ids.shape[1]
            chunks = [
                torch.nn.functional.pad(c, (0, keys - c.shape[3]), value=point.fill) for c in chunks
            ]
        return torch.cat(chunks, dim=point.position_axis)

    return {name: together(point) for name, point in points.items()}


def plain_residuals(
    folder: Path, ids: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The oracle: every residual of one plain forward pass of transformers, (position, hidden size)
    by hook point.

    The last block's output is not in `hidden_states`, whose last entry is normed: a hook on the
    last block reads it, and the model's own norm of it is shown to be that last entry.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
    kept = []
    blocks[-1].register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model(
            torch.tensor(ids)[None], output_hidden_states=True, use_cache=False
        ).hidden_states
    found = {f"blocks.{i}.hook_resid_pre": s[0] for i, s in enumerate(states[:-1])}
    found |= {f"blocks.{i - 1}.hook_resid_post": s[0] for i, s in enumerate(states[:-1]) if i}
    found[f"blocks.{len(blocks) - 1}.hook_resid_post"] = kept[0][0]
    norm = next(
        (m for n, m in model.named_modules() if n.split(".")[-1] in FINAL_NORMS and "." not in n),
        None,
    )
    if norm is not None:
        torch.testing.assert_close(norm(kept[0])[0], states[-1][0])
    return found


FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Project:
    """A copy of the pipeline, whose YAML files a test may edit, and a real snakemake."""

    folder: Path

    def command(self, *arguments: str, profiles: str = "", overrides: str = "") -> list[str]:
        requested = [f"profiles={profiles}"] * bool(profiles) + [f"set={overrides}"] * bool(
            overrides
        )
        config_arguments = ["--config", *requested] if requested else []
        base = [sys.executable, "-m", "snakemake", "--profile", "workflow/profiles/local"]
        return [*base, *arguments, *config_arguments]

    def snakemake(
        self, *arguments: str, profiles: str = "", overrides: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(*arguments, profiles=profiles, overrides=overrides),
            cwd=self.folder,
            env=preloading.environment(),
            capture_output=True,
            text=True,
            timeout=1800,
        )

    def jobs(self, **requested: str) -> dict[str, int]:
        """What a dry run says it would run: the number of jobs by rule."""
        dry = self.snakemake("--dry-run", "--quiet", "host", **requested)
        assert dry.returncode == 0, dry.stdout + dry.stderr
        text = dry.stdout + dry.stderr
        if "Nothing to be done" in text:
            return {}
        table = text.split("Job stats:")[1].split("\n\n")[0].splitlines()[3:]
        return {
            line.split()[0]: int(line.split()[1])
            for line in table
            if line.split()[0] not in ("all", "total")
        }

    def results(self, run: str) -> Path:
        return self.folder / "results" / run


def copy_project(folder: Path) -> Project:
    """The project's files, which a test may edit, and a link to the library, which none does."""
    for name in ("Snakefile", "workflow", "config", "envs"):
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(
                place,
                folder / name,
                ignore=shutil.ignore_patterns("theloom", "*.egg-info"),
            )
        else:
            shutil.copy(place, folder / name)
    (folder / "workflow/theloom").symlink_to(ROOT / "workflow/theloom")
    return Project(folder)
