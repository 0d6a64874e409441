"""Adapters through the stages of the pipeline: rows are those of the model that PEFT merges."""

import json
import shutil

import h5py
import pytest
import theloom
import torch
from adapter_support import merge_with_peft, save_adapter
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from support import a_config, build_tiny, plain_residuals, stages, with_bytes
from theloom.cli.main import main
from theloom.config.frozen import frozen_digest
from theloom.engine.layerwise.model import opened
from theloom.errors import ModelError, TheLoomError
from theloom.model.checkpoint.signatures import files_fingerprint
from theloom.model.files import prepare_files
from theloom.model.loading import load_model
from theloom.model.quantization import bitsandbytes_config
from theloom.planning import estimate
from theloom.planning.estimates import estimate_file

TARGETS = ["q_proj", "v_proj", "down_proj"]
SMALL = (
    "corpus=text corpus.max_tokens=300 extraction.batch_tokens=1 extraction.shards=1 "
    "memory.streaming_chunk_size=256 "
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and adapters of it by name."""
    home = tmp_path_factory.mktemp("adapters")
    base = with_bytes(build_tiny("llama", home / "base", vocab_size=260, attention_bias=True))
    configs = {
        "lora": LoraConfig(
            r=4, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 8}, bias="all"
        ),
        "dora": LoraConfig(
            r=4,
            target_modules=[*TARGETS, "embed_tokens", "lm_head"],
            use_dora=True,
            modules_to_save=["norm"],
        ),
        "plain": LoraConfig(r=4, target_modules=TARGETS),
        "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    }
    for number, (name, config) in enumerate(configs.items()):
        save_adapter(base, home / name, config, number)
    text = home / "texts"
    text.mkdir()
    for name, content in {"one": "x", "two": "The quick brown fox", "three": "Over. " * 30}.items():
        (text / f"{name}.txt").write_text(content)
    return home


def run_of(tmp_path, folders, adapter, more=""):
    return stages(
        tmp_path,
        folders / "base",
        f"{SMALL} corpus.path={folders / 'texts'} model.adapter={adapter} {more}",
    )


@pytest.fixture(scope="module")
def merged(tmp_path_factory, folders):
    """The folder of what PEFT makes of the base and two adapters, one after the other."""
    folder = tmp_path_factory.mktemp("merged")
    model = merge_with_peft(folders / "base", [folders / "lora", folders / "dora"])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["resident", "layerwise"])
def two(request, tmp_path_factory, folders):
    """A finished run with two adapters."""
    listed = f"[{folders / 'lora'},{folders / 'dora'}]"
    more = f"extraction.execution={request.param}"
    return run_of(tmp_path_factory.mktemp(request.param), folders, listed, more).all()


def same_rows(activations, model_folder):
    acts = theloom.open(activations)
    for number in range(len(acts.documents)):
        document = acts.document(number)
        expected = plain_residuals(model_folder, document.input_ids.tolist())
        for name in acts.hooks:
            assert torch.equal(document[name], expected[name]), (number, name)


def test_rows_are_those_of_the_model_that_peft_merges(two, merged, caplog):
    same_rows(two.activations, merged)
    two.verify()
    with h5py.File(two.folder / "verification.h5") as file:
        assert file["recomputed/max_abs_error"][:].max() == 0


def test_a_file_says_which_adapters_its_rows_are_of(two, folders):
    listed = theloom.open(two.activations).attributes["model_adapters"]
    listed = json.loads(listed) if isinstance(listed, str) else listed
    assert [a["kind"] for a in listed] == ["LORA", "LORA"]
    assert [a["source"] for a in listed] == [str(folders / n) for n in ("lora", "dora")]
    assert [a["ignored"] for a in listed] == [[], ["lm_head"]]
    assert len({a["hash"] for a in listed}) == 2


def test_a_run_without_adapters_has_the_config_that_it_had(tmp_path, folders):
    plain = run_of(tmp_path / "a", folders, "null")
    for stage in ("estimate", "model", "extract", "tokens"):
        frozen = json.loads((plain.folder / f"{stage}.json").read_text())
        assert "adapter" not in frozen["config"]["model"], stage
    one = run_of(tmp_path / "b", folders, folders / "ia3")
    assert json.loads((one.folder / "model.json").read_text())["config"]["model"]["adapter"] == [
        str(folders / "ia3")
    ]
    for stage, same in {"tokens": True, "model": False, "extract": False}.items():
        digests = {frozen_digest(run.folder / f"{stage}.json") for run in (plain, one)}
        assert (len(digests) == 1) == same, stage


def test_an_adapter_as_source_stands_for_its_base(tmp_path, folders):
    adapter = tmp_path / "ia3"
    shutil.copytree(folders / "ia3", adapter)
    run = stages(
        tmp_path / "run",
        adapter,
        f"{SMALL} corpus.path={folders / 'texts'} extraction.execution=layerwise",
    ).all()
    model = merge_with_peft(folders / "base", [adapter])
    model.save_pretrained(tmp_path / "merged")
    same_rows(run.activations, tmp_path / "merged")
    one = prepare_files(run.config("model").model)
    assert [a.kind for a in one.adapters] == ["IA3"]
    before = files_fingerprint(one)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t * 2 for k, t in tensors.items()}, adapter / "adapter_model.safetensors")
    assert files_fingerprint(one) != before
    with pytest.raises(ModelError, match="have changed since load_model"):
        run.extract()
    (adapter / "adapter_config.json").unlink()
    assert main(["verify", str(run.folder), "--recompute", "1"]) != 0


def test_the_estimate_counts_the_adapter(tmp_path, folders):
    sizes = {}
    for name in ("null", "lora"):
        run = run_of(tmp_path / name, folders, name if name == "null" else folders / name)
        estimate.run_estimate(run.config("estimate"), run.folder / "estimate.h5")
        sizes[name] = estimate_file.read(run.folder / "estimate.h5")
    tensors = load_file(folders / "lora/adapter_model.safetensors").values()
    held = sum(4 * t.numel() for t in tensors)
    more = sizes["lora"].load_peak["fp32"] - sizes["null"].load_peak["fp32"]
    assert more == held + 8 * 96 * 64  # twice the largest weight, in FP32


def refusal(run):
    with pytest.raises(TheLoomError) as error:
        run.prepare()
    line = str(error.value)
    assert "\n" not in line
    return line


def changed(folders, tmp_path, **described):
    folder = tmp_path / "changed"
    shutil.copytree(folders / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | described))
    return folder


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"peft_type": "VBLORA"}, "of the kind VBLORA, which is not merged here"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "has layer_replication"),
        ({"target_modules": "(q_proj"}, "does not fit LlamaModel"),
        ({"target_modules": ["nowhere"]}, "does not fit LlamaModel"),
        ({"target_modules": ["q_proj"]}, "have no place in LlamaModel"),
        ({"target_modules": [*TARGETS, "k_proj"], "bias": "none"}, "of another model"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, folders, described, words):
    adapter = changed(folders, tmp_path, **described)
    assert words in refusal(run_of(tmp_path / "run", folders, adapter))


def test_prompts_and_folders_without_an_adapter_are_refused(tmp_path, folders):
    prompts = save_adapter(
        folders / "base",
        tmp_path / "prompts",
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    line = refusal(run_of(tmp_path / "a", folders, prompts))
    assert "PROMPT_TUNING, which adds prompts" in line
    line = refusal(run_of(tmp_path / "b", folders, folders / "base"))
    assert "it is a whole model: give it as model.source" in line
    line = refusal(run_of(tmp_path / "c", folders, f"{folders / 'lora'}@main"))
    assert "is a local folder, and has no revision" in line


def test_damaged_weights_are_refused(tmp_path, folders):
    adapter = changed(folders, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_A" in k)
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    assert "lacks weights" in refusal(run_of(tmp_path / "d", folders, adapter))
    save_file(tensors | {key: tensors[key] * float("nan")}, file)
    assert "holds NaN" in refusal(run_of(tmp_path / "a", folders, adapter))
    file.write_bytes(file.read_bytes()[:200])
    assert "damaged or cut short" in refusal(run_of(tmp_path / "b", folders, adapter))
    file.unlink()
    assert "has no adapter_model.safetensors" in refusal(run_of(tmp_path / "c", folders, adapter))


def test_peft_that_is_not_installed_is_named_with_its_extra(tmp_path, folders, monkeypatch):
    import theloom.model.adapters.files as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    line = refusal(run_of(tmp_path, folders, folders / "lora"))
    assert "pip install 'theloom[adapters]'" in line


def test_quantised_weights_are_merged_as_peft_does_or_refused(tmp_path, folders):
    quantised = "memory.quantization=8bit memory.precision_mode=fp32 "
    config = a_config(folders / "base", f"{quantised} model.adapter={folders / 'plain'}")
    ours = load_model(config, prepare_files(config.model)).architecture.model
    options = {
        "quantization_config": bitsandbytes_config("8bit", "fp32"),
        "dtype": torch.float32,
    }
    theirs = merge_with_peft(folders / "base", [folders / "plain"], **options).model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    config = a_config(folders / "base", f"{quantised} model.adapter={folders / 'dora'}")
    with pytest.raises(ModelError, match="kind DoRA, which is not merged into quantised"):
        load_model(config, prepare_files(config.model))
    layerwise = opened(config, prepare_files(config.model))
    with pytest.raises(ModelError, match="not merged into weights of 8bit layer by layer"):
        layerwise.__enter__()
