"""Builders that the tests share: a config for any model, tiny real models, a real snakemake in a copy of the project."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from theloom import config
from theloom.schema import Config

ROOT = Path(__file__).parents[1]


def a_config(model_source: str | Path, overrides: str = "") -> Config:
    """The whole config of a run on the CPU, with any model."""
    runs = config.runs(ROOT / "config", "custom", f"model.source={model_source} extraction.device=cpu {overrides}")
    (run,) = runs.values()
    return config.typed(run.config)


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
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
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
    model_config = AutoConfig.for_model(model_type, **{**common, **TINY.get(model_type, {}), **numbers})
    model = AutoModelForCausalLM.from_config(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Project:
    """A copy of the pipeline, whose YAML files a test may edit, and a real snakemake to run in it."""

    folder: Path

    def command(self, *arguments: str, profiles: str = "", overrides: str = "") -> list[str]:
        asked = [f"profiles={profiles}"] * bool(profiles) + [f"set={overrides}"] * bool(overrides)
        config_arguments = ["--config", *asked] if asked else []
        base = [sys.executable, "-m", "snakemake", "--profile", "workflow/profiles/local"]
        return [*base, *arguments, *config_arguments]

    def snakemake(self, *arguments: str, profiles: str = "", overrides: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, profiles=profiles, overrides=overrides),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def jobs(self, **asked: str) -> dict[str, int]:
        """What a dry run says it would run: the number of jobs by rule."""
        dry = self.snakemake("--dry-run", "--quiet", "host", **asked)
        assert dry.returncode == 0, dry.stdout + dry.stderr
        text = dry.stdout + dry.stderr
        if "Nothing to be done" in text:
            return {}
        table = text.split("Job stats:")[1].split("\n\n")[0].splitlines()[3:]
        return {line.split()[0]: int(line.split()[1]) for line in table if line.split()[0] not in ("all", "total")}

    def results(self, run: str) -> Path:
        return self.folder / "results" / run


def copy_project(folder: Path) -> Project:
    for name in ("Snakefile", "workflow", "config", "envs"):
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(place, folder / name)
    return Project(folder)
