"""Image models in stages through the stages of the pipeline, against plain transformers."""

import copy
import json

import h5py
import pytest
import theloom
import torch
import transformers
from support import allocator_peak, stages
from theloom.cli import main
from theloom.errors import ConfigError, CorpusError, HookError, ModelError
from theloom.hooks import blocks
from theloom.memory import trace
from theloom.memory.sizes import Workload
from theloom.model.checkpoint.classes import model_class
from theloom.model.fake import fake_model
from theloom.model.files import hf_config
from theloom.precision import torch_dtype
from towers_support import processed, write_media

_LAST = {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4}
_SEG = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}
CONFIGS = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    "swin": {**_LAST, "image_size": 32, "patch_size": 2},
    "segformer": _SEG,
}
# hook points of one number of rows, and that number
READ = {"resnet": ((0, 1), 64), "convnext": ((0, 1), 64), "swin": ((2, 3), 16)}
READ["segformer"] = ((2,), 4)


def build(kind, folder):
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # parts that begin as zeros would hide a fault
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    settings = {"image_processor_type": "ViTImageProcessor", "size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media") / "images", "images")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return build("resnet", tmp_path_factory.mktemp("models") / "resnet")


def requested(images, hooks, more=""):
    return (
        f"corpus=images corpus.path={images} corpus.max_tokens=null extraction.shards=1 "
        f"memory.activation_cache_filter=[{hooks}] {more}"
    )


def plain_rows(folder, file):
    """Every entry of the model's own hidden states as rows: maps by height, then by width."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**processed(file, folder, "images"), output_hidden_states=True).hidden_states
    return [s[0] if s.ndim == 3 else torch.einsum("chw->hwc", s[0]).flatten(0, 1) for s in states]


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_stages_are_those_of_plain_transformers(kind, tmp_path, images):
    numbers, rows = READ[kind]
    folder = build(kind, tmp_path / "model")
    hooks = [f"stages.{number}.hook_out" for number in numbers]
    run = stages(tmp_path / "run", folder, requested(images, ",".join(hooks))).all()
    run.verify()
    acts = theloom.open(run.activations)
    assert list(acts.hooks) == hooks
    for number, file in enumerate(sorted(images.iterdir())):
        expected = plain_rows(folder, file)
        for stage, hook in zip(numbers, hooks, strict=True):
            found = acts.document(number)[hook]
            assert found.shape == expected[stage].shape
            assert len(found) == rows
            assert (found - expected[stage]).abs().max() <= 1e-5 * expected[stage].abs().max()


def test_stages_of_several_resolutions_are_no_run(tmp_path, images, resnet):
    run = stages(tmp_path / "run", resnet, requested(images, "stages.*.hook_out"))
    words = r"stages\.0\.hook_out \(64 rows of 8\), .*stages\.2\.hook_out \(16 rows of 24\); make"
    with pytest.raises(HookError, match=words) as found:
        run.prepare()
    assert "\n" not in str(found.value)


def test_a_model_in_stages_says_which_hook_points_it_has(tmp_path, images, resnet, capsys):
    run = stages(tmp_path / "run", resnet, requested(images, "blocks.*.hook_resid_post"))
    words = (
        r"built in stages, whose hook points are stages\.0\.hook_out \(64 rows of 8\), stages\.1"
    )
    with pytest.raises(ModelError, match=words):
        run.prepare()
    assert main.main(["hooks", str(resnet), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hooks"]
    assert [(h["name"], h["shape"], h["rows"]) for h in found] == [
        ("stages.0.hook_out", [8], 64),
        ("stages.1.hook_out", [16], 64),
        ("stages.2.hook_out", [24], 16),
    ]


def test_stages_go_with_images_of_one_size(tmp_path, images, resnet):
    for words, hooks, error in [
        ("corpus.max_tokens=9", "stages.1.hook_out", "the corpus is python_docs; set corpus"),
        (f"corpus=images corpus.path={images}", "stages.1.hook_out,hook_embed", "of one kind"),
    ]:
        filters = f"memory.activation_cache_filter=[{hooks}]"
        with pytest.raises(ConfigError, match=error):
            stages(tmp_path / "a", resnet, f"{words} {filters}")
    saved = (resnet / "preprocessor_config.json").read_text()
    (resnet / "preprocessor_config.json").write_text(
        json.dumps(json.loads(saved) | {"do_resize": False})
    )
    try:
        run = stages(tmp_path / "b", resnet, requested(images, "stages.1.hook_out"))
        with pytest.raises((ModelError, CorpusError), match="makes images of several sizes"):
            run.prepare()
    finally:
        (resnet / "preprocessor_config.json").write_text(saved)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_trace_gives_the_peak_of_stages(kind, precision, tmp_path, images):
    # products of 16 bits have buffers of oneDNN's own on some processors, as large as such maps
    with torch.backends.mkldnn.flags(enabled=precision == "fp32"):
        predicted, measured = peaks_of_stages(kind, precision, tmp_path, images)
    assert abs(predicted / measured - 1) <= 1e-3, (predicted, measured)


def peaks_of_stages(kind, precision, tmp_path, images) -> tuple[int, int]:
    folder = build(kind, tmp_path / "model")
    run = stages(tmp_path / "run", folder, requested(images, "stages.2.hook_out"))
    config = hf_config(run.config("model").model)
    real = model_class(config)._from_config(copy.deepcopy(config), dtype=torch_dtype(precision))
    described, fake = blocks.find_blocks(real.eval()), fake_model(config, precision)
    points = fake.catalog.select(["stages.2.hook_out"])
    assert [p.name for p in described.stream] == [p.name for p in fake.catalog.points]
    workload = Workload(4, points[0].rows, points[0].rows)
    ids = torch.zeros(workload.windows, workload.tokens, dtype=torch.int64)
    predicted = trace.trace(fake, workload, points, held=True)[0].total
    return predicted, allocator_peak(lambda: trace.run(described, ids, workload, points, held=True))


def test_model_record_has_the_stages(tmp_path, images, resnet):
    run = stages(tmp_path / "run", resnet, requested(images, "stages.2.hook_out"))
    run.prepare()
    with h5py.File(run.folder / "model.h5") as file:
        assert [n.decode() for n in file["hooks/name"]] == [
            f"stages.{number}.hook_out" for number in range(3)
        ]
