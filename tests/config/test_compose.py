"""Composition, sweeps, names of runs, frozen stages, and what is refused with which words."""

import json
import shutil

import pytest
from omegaconf.errors import MissingMandatoryValue
from support import ROOT
from theloom.config import compose, schema
from theloom.config import names as names_of_runs
from theloom.config.frozen import STAGES, freeze, load_frozen, to_plain
from theloom.errors import ConfigError

CONFIG = ROOT / "config"


def one(overrides: str = "", profiles: str = "smollm2-135m") -> compose.Run:
    (run,) = compose.runs(CONFIG, profiles, overrides).values()
    return run


def test_default_yaml_holds_the_documented_memory_block():
    text = (CONFIG / "default.yaml").read_text()
    for line in (
        "precision_mode: auto",
        "quantization: null",
        "enable_gradient_checkpointing: false",
        "streaming_chunk_size: 512",
        "memory_warning_threshold: 0.85",
        "activation_cache_filter: []",
    ):
        assert f"  {line}" in text


def test_a_profile_overrides_the_defaults_and_the_command_line_overrides_the_profile():
    assert one().config["memory"]["precision_mode"] == "fp32"
    assert one().config["memory"]["memory_warning_threshold"] == 0.85
    assert one("memory.precision_mode=bf16").config["memory"]["precision_mode"] == "bf16"


def test_every_profile_composes_and_names_a_model_with_its_numbers():
    runs = compose.runs(CONFIG, "smollm2-135m,3b,7b,13b,30b,70b")
    assert list(runs) == ["smollm2-135m", "3b", "7b", "13b", "30b", "70b"]
    for run in runs.values():
        assert run.config["model"]["architecture"]["parameters"] > 1e8


def test_a_comma_sweeps_and_each_combination_is_a_run():
    runs = compose.runs(
        CONFIG,
        "smollm2-135m",
        "memory.streaming_chunk_size=128,256 memory.precision_mode=fp32,bf16",
    )
    assert list(runs) == [
        "smollm2-135m+streaming_chunk_size=128+precision_mode=fp32",
        "smollm2-135m+streaming_chunk_size=128+precision_mode=bf16",
        "smollm2-135m+streaming_chunk_size=256+precision_mode=fp32",
        "smollm2-135m+streaming_chunk_size=256+precision_mode=bf16",
    ]
    assert [r.config["memory"]["streaming_chunk_size"] for r in runs.values()] == [
        128,
        128,
        256,
        256,
    ]


def test_a_list_is_one_value_and_not_a_sweep():
    run = one("memory.activation_cache_filter=[blocks.1.hook_resid_pre,blocks.*.hook_resid_post]")
    assert run.config["memory"]["activation_cache_filter"] == [
        "blocks.1.hook_resid_pre",
        "blocks.*.hook_resid_post",
    ]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("name=mine memory.streaming_chunk_size=64", ["mine"]),
        ("name=a,b", ["a", "b"]),
        (
            "name=mine memory.streaming_chunk_size=64,65",
            ["mine+streaming_chunk_size=64", "mine+streaming_chunk_size=65"],
        ),
        (
            "corpus=text corpus.path='/a b/c.txt'",
            ["smollm2-135m+corpus=text+path=-a-b-c.txt-eef307c8"],
        ),
    ],
)
def test_names_of_runs(overrides, names):
    assert list(compose.runs(CONFIG, "smollm2-135m", overrides)) == names


def test_long_values_get_short_names_that_differ():
    hooks = [f"[{','.join(f'blocks.{i}.hook_resid_post' for i in range(n))}]" for n in (8, 9)]
    first, second = (one(f"memory.activation_cache_filter={h}").name for h in hooks)
    assert first != second
    assert max(len(first), len(second)) < 100


def test_values_that_look_alike_in_a_path_are_different_runs():
    names = [
        one(f"corpus=text corpus.path={path}").name for path in ("/a/b", "/a-b", "a/b", "-a-b")
    ]
    assert len(set(names)) == 4


def test_what_a_name_shows_of_a_key_is_enough_to_tell_it():
    words = [names_of_runs.shown_key(key.name) for key in schema.leaf_keys()]
    assert len(words) == len(set(words))


def test_the_default_profile_is_the_one_of_default_yaml():
    assert list(compose.runs(CONFIG)) == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("profiles", "overrides", "words"),
    [
        ("9b", "", ["'9b'", "choose from", "smollm2-135m"]),
        ("smollm-135m", "", ["did you mean 'smollm2-135m'?"]),
        ("", "", ["names no profile"]),
        ("3b,3b", "", ["'3b'", "twice"]),
        (
            "3b",
            "memory.streaming_chunk=64",
            ["unknown key 'memory.streaming_chunk'", "'memory.streaming_chunk_size'"],
        ),
        ("3b", "+foo=1", ["unknown key 'foo'", "memory"]),
        ("3b", "+memory.foo=1", ["unknown key 'memory.foo'", "memory.precision_mode"]),
        (
            "3b",
            "memory.streaming_chunk_size=many",
            ["memory.streaming_chunk_size", "'many'", "integer"],
        ),
        ("3b", "memory.streaming_chunk_size=0", ["memory.streaming_chunk_size", "least is 3"]),
        (
            "3b",
            "memory.precision_mode=fp8",
            ["memory.precision_mode", "'fp8'", "[auto, fp32, fp16, bf16]"],
        ),
        ("3b", "memory.quantization=2bit", ["memory.quantization", "[8bit, 4bit]"]),
        ("3b", "memory.memory_warning_threshold=85", ["memory.memory_warning_threshold", "share"]),
        ("3b", "memory.activation_cache_filter=x", ["memory.activation_cache_filter", "list"]),
        ("3b", "extraction.device=gpu", ["extraction.device", "'gpu'", "cuda"]),
        ("3b", "corpus=books", ["corpus=books", "python-docs"]),
        ("3b", "corpus=text", ["corpus.path", "not set"]),
        ("3b", "corpus=hub", ["corpus.dataset", "not set"]),
        ("3b", "verify.tolerance=0", ["verify.tolerance", "not above 0"]),
        ("3b", "profile=7b", ["profiles=A,B"]),
        ("3b", "a=[", ["unknown key 'a'"]),
        ("3b", "name=../x", ["name", "folder"]),
        ("custom", "", ["model.source", "not set"]),
        (
            "custom",
            "model.source=x model.architecture.hidden_size=64",
            ["model.architecture", "null"],
        ),
    ],
)
def test_mistakes_are_refused_in_one_line_that_names_the_key(profiles, overrides, words):
    with pytest.raises(ConfigError) as caught:
        compose.runs(CONFIG, profiles, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_key_that_no_schema_has_is_refused_in_a_yaml_file_too(tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "default.yaml").write_text((CONFIG / "default.yaml").read_text())
    (tmp_path / "corpus/python-docs.yaml").write_text("kind: python_docs\n")
    (tmp_path / "profile/mine.yaml").write_text(
        "# @package _global_\nmodel:\n  source: x\n  colour: red\n"
    )
    with pytest.raises(ConfigError, match=r"unknown key 'model\.colour'"):
        compose.runs(tmp_path, "mine")


@pytest.mark.parametrize("value", ["1234e56", "1_000", "0x1f", "yes", "1.50", "007"])
def test_a_text_that_yaml_would_change_is_refused_in_a_profile(tmp_path, value):
    folder = shutil.copytree(CONFIG, tmp_path / "config")
    for written in (value, f"'{value}'"):
        text = f"# @package _global_\nmodel: {{source: a/b, revision: {written}}}\n"
        (folder / "profile/mine.yaml").write_text(text)
        if written == value:
            with pytest.raises(ConfigError, match=f"model.revision: YAML reads {value} as"):
                compose.runs(folder, "mine")
        else:
            (run,) = compose.runs(folder, "mine").values()
            assert run.config["model"]["revision"] == value


def test_a_frozen_stage_holds_its_keys_and_reading_another_raises(tmp_path):
    freeze(one("memory.streaming_chunk_size=77").stage("estimate"), tmp_path / "estimate.json")
    thawed = load_frozen(tmp_path / "estimate.json")
    assert thawed.memory.streaming_chunk_size == 77
    assert thawed.memory.precision_mode is schema.PrecisionMode["fp32"]
    assert to_plain(thawed) == json.loads((tmp_path / "estimate.json").read_text())["config"]
    with pytest.raises(MissingMandatoryValue):
        thawed.verify.documents  # noqa: B018
    with pytest.raises(MissingMandatoryValue):
        thawed.report.title  # noqa: B018


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("memory.streaming_chunk_size=64", {"estimate"}),
        ("extraction.batch_tokens=64", {"estimate"}),
        ("memory.activation_cache_filter=[blocks.0.hook_resid_pre]", {"estimate", "extract"}),
        ("verify.documents=3", {"verify"}),
        ("store.merge=physical", {"merge"}),
        ("corpus.encoding=latin-1", {"tokens", "answers"}),
        ("resources.mem_mb=1", {"resources"}),
    ],
)
def test_a_key_changes_the_frozen_config_of_the_stages_that_depend_on_it_alone(override, stages):
    before, after = one(), one(f"name=smollm2-135m {override}")
    changed = {s for s in STAGES if before.stage(s) != after.stage(s)}
    assert changed == stages


def test_frozen_configs_are_plain_json_and_every_key_is_frozen_for_some_stage():
    whole = one()
    frozen: set[str] = set()
    for name in STAGES:
        stage = whole.stage(name)
        assert json.loads(json.dumps(stage)) == stage
        frozen |= set(STAGES[name].keys)
    for key in schema.leaf_keys():
        if key.name != "name":
            assert any(key.name == k or key.name.startswith(f"{k}.") for k in frozen), key.name


def test_the_readme_holds_the_table_of_all_keys():
    assert schema.key_table() in (ROOT / "config/README.md").read_text()


def test_environment_file_pins_what_the_constraints_pin():
    pins = (ROOT / "envs/constraints.txt").read_text().split()
    for line in (ROOT / "envs/theloom.yaml").read_text().splitlines():
        if "==" in line:
            assert line.strip("- ") in pins


@pytest.mark.parametrize(
    ("max_tokens", "shards"), [("16384", 2), ("500001", 3), ("10000000000", 1000), ("null", 8)]
)
def test_shards_that_are_left_open_follow_from_the_tokens(max_tokens, shards):
    (run,) = compose.runs(
        CONFIG, "custom", f"model.source=a/b corpus.max_tokens={max_tokens}"
    ).values()
    assert run.config["extraction"]["shards"] == shards
    assert run.stage("merge")["config"]["extraction"]["shards"] == shards


@pytest.mark.parametrize(
    ("old", "new"), [("least_shards", "min_shards"), ("needed_gpu_mb", "min_free_gpu_mb")]
)
def test_a_renamed_key_works_under_its_old_name_with_a_warning(tmp_path, caplog, old, new):
    folder = shutil.copytree(ROOT / "config", tmp_path / "config")
    profile = folder / "profile/3b.yaml"
    text = profile.read_text()
    assert "\nresources:" in text
    section, _, _ = text.partition("\nresources:")[2].partition("\n")
    profile.write_text(text.replace(f"\nresources:{section}\n", f"\nresources:\n  {old}: 7\n"))
    for overrides, value in ((None, 7), (f"resources.{old}=9", 9)):
        caplog.clear()
        (run,) = compose.runs(folder, "3b", overrides).values()
        assert run.config["resources"][new] == value
        assert old not in run.config["resources"]
        warned = [r.getMessage() for r in caplog.records]
        assert warned == [f"resources.{old} is now called resources.{new}; use the new name"]
