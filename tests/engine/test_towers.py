"""Models of images and audio through the stages of the pipeline, against plain transformers."""

import importlib.util
import io
import re
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import theloom
import torch
from corpus_support import byte_tokenizer
from PIL import Image
from support import ROOT, stages
from theloom.errors import CorpusError, ModelError, StoreError, TheLoomError
from theloom.extraction import extract_hidden_states
from theloom.planning.forecast import forecast
from towers_support import TOWERS, build, plain_states, processed, tower_of, write_media
from transformers import AutoModel


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {reads: write_media(folder / reads, reads) for reads in ("images", "audio")}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return build("vit", tmp_path_factory.mktemp("models") / "vit")


def requested(reads, path, more="", side=""):
    hooks = ",".join(f"{side}blocks.*.hook_resid_{which}" for which in ("pre", "post"))
    return (
        f"corpus={reads} corpus.path={path} corpus.max_tokens=null extraction.shards=2 "
        f"memory.activation_cache_filter=[{hooks}] {more}"
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_rows_are_those_of_plain_transformers(kind, tmp_path, media):
    check_rows(kind, tmp_path, media)


def check_rows(kind, tmp_path, media):
    tower = tower_of(kind)
    folder, files = build(kind, tmp_path / "model"), sorted(media[tower.reads].iterdir())
    words = requested(tower.reads, media[tower.reads], side=tower.side)
    run = stages(tmp_path / "run", folder, words).all()
    run.verify()
    acts = theloom.open(run.activations)
    assert [acts.document(n).id for n in range(5)] == [file.name for file in files]
    for number, file in enumerate(files):
        document, expected = acts.document(number), plain_states(folder, kind, file)
        assert set(acts.hooks) == set(expected)
        for hook, values in expected.items():
            assert document[hook].shape == values.shape
            assert (document[hook] - values).abs().max() <= 1e-5 * values.abs().max()


def test_dinov3_goes_with_torchvision_and_says_so_without(tmp_path, media):
    if importlib.util.find_spec("torchvision"):
        check_rows("dinov3_vit", tmp_path, media)
        return
    with pytest.raises(ModelError) as refusal:
        check_rows("dinov3_vit", tmp_path, media)
    version, _, build = torch.__version__.partition("+")
    assert str(refusal.value) == (
        f"model.source: the processor of {tmp_path / 'model'} needs torchvision, in the build that "
        f"goes with torch {torch.__version__}: pip install torch=={version} torchvision"
        + f" --index-url https://download.pytorch.org/whl/{build}"
        * bool(build)
    )


def test_class_tokens_and_padding_are_marked_as_special(tmp_path, vit, media):
    run = stages(tmp_path / "images", vit, requested("images", media["images"], "rows.keep=first"))
    acts = theloom.open(run.all().activations)
    assert len(acts) == 5
    expected = plain_states(vit, "vit", media["images"] / "image0.png")
    hook = "blocks.2.hook_resid_post"
    torch.testing.assert_close(acts[hook][:1], expected[hook][:1])
    folder = build("whisper", tmp_path / "whisper")
    words = requested("audio", media["audio"], side="encoder.")
    acts = theloom.open(stages(tmp_path / "audio", folder, words).all().activations)
    special = acts.token_table("special").numpy(slice(None)).reshape(5, 100)
    clips = [soundfile.info(file).frames for file in sorted(media["audio"].iterdir())]
    assert (special == 0).sum(1).tolist() == [-(-count * 100 // 32000) for count in clips]


def test_a_table_of_images_has_the_rows_of_its_files(tmp_path, vit, media):
    files = sorted(media["images"].iterdir())
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": cells, "label": ["a", "b", "c", "d", "e"]})
    pa.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=2)
    words = requested("images", tmp_path / "table.parquet", "corpus.columns=[label]")
    acts = theloom.open(stages(tmp_path / "table", vit, words).all().activations)
    whole = stages(tmp_path / "files", vit, requested("images", media["images"])).all()
    for hook in acts.hooks:
        assert torch.equal(acts[hook][:], theloom.open(whole.activations)[hook][:])
    assert list(acts.columns["label"].values) == [b"a", b"b", b"c", b"d", b"e"]


def test_the_text_half_of_clip_reads_texts(tmp_path):
    folder = build("clip", tmp_path / "model")
    byte_tokenizer(folder)
    (tmp_path / "text.txt").write_text("some words")
    words = "corpus=text corpus.path={} memory.activation_cache_filter=[blocks.*.hook_resid_pre]"
    run = stages(tmp_path / "run", folder, words.format(tmp_path / "text.txt")).all()
    run.verify()
    document = theloom.open(run.activations).document(0)
    model = AutoModel.from_pretrained(folder).eval().text_model
    with torch.no_grad():
        states = model(
            torch.tensor(document.input_ids.tolist())[None], output_hidden_states=True
        ).hidden_states
    for number in range(3):
        found = document[f"blocks.{number}.hook_resid_pre"]
        torch.testing.assert_close(found, states[number][0], rtol=1e-5, atol=1e-6)


def test_rows_that_the_mask_calls_padding_are_special(tmp_path):
    folder = build("parakeet_encoder", tmp_path / "model")
    (tmp_path / "audio").mkdir()
    for count in (16000, 16640):  # the last frame of the second is a row of its own
        soundfile.write(tmp_path / f"audio/{count}.wav", np.ones(count) * 0.1, 16000)
    run = stages(tmp_path / "run", folder, requested("audio", tmp_path / "audio")).all()
    special = theloom.open(run.activations).token_table("special").numpy(slice(None))
    model, masks = AutoModel.from_pretrained(folder).eval(), []
    for file in sorted((tmp_path / "audio").iterdir()):
        with torch.no_grad():
            masks.append(model(**processed(file, folder, "audio")).attention_mask[0])
    assert special.tolist() == (torch.cat(masks) == 0).int().tolist()
    assert special.any()


def test_a_half_that_a_model_has_not_is_refused_with_those_that_it_has(tmp_path, media):
    folder = build("clip", tmp_path / "model")
    with pytest.raises(TheLoomError, match="reads images and texts, and the corpus has audio"):
        stages(tmp_path / "run", folder, requested("audio", media["audio"])).prepare()


def png(mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, (16, 16)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("cut.png", png()[:40], r"cut\.png: is no image that can be read"),
        ("text.png", b"no image", r"text\.png: is no image that can be read"),
        ("notes.txt", b"words", r"images holds no file of \.png"),
    ],
)
def test_a_file_that_is_no_image_is_named(name, content, error, tmp_path, vit):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(content)
    run = stages(tmp_path / "run", vit, requested("images", tmp_path / "images"))
    with pytest.raises(TheLoomError, match=error) as found:
        run.prepare()
    assert "\n" not in str(found.value)


def test_a_changed_image_stops_the_job(tmp_path, vit, media):
    shutil.copytree(media["images"], tmp_path / "images")
    run = stages(tmp_path / "run", vit, requested("images", tmp_path / "images"))
    run.prepare()
    (tmp_path / "images/image1.png").write_bytes(png())
    with pytest.raises(CorpusError, match=r"image1\.png: has changed since its rows were counted"):
        run.extract()


def test_clips_that_the_model_does_not_take_are_named(tmp_path):
    folder = build("wav2vec2", tmp_path / "model")
    (tmp_path / "audio").mkdir()
    clip = tmp_path / "audio/clip.wav"
    for rate, more, error in [
        (8000, "", r"clip\.wav: has 8,000 samples a second, and the model takes 16,000"),
        (16000, "corpus.context_length=99", r"clip\.wav: has 200 rows, and memory is planned for"),
    ]:
        soundfile.write(clip, np.ones(16000), rate)
        run = stages(tmp_path / "run", folder, requested("audio", tmp_path / "audio", more))
        with pytest.raises(CorpusError, match=error):
            run.prepare()
        shutil.rmtree(tmp_path / "run")


def test_a_model_and_a_corpus_that_do_not_go_together_are_refused(tmp_path, vit, media, tiny_llama):
    words = requested("audio", media["audio"])
    with pytest.raises(TheLoomError, match="reads images, and the corpus has audio"):
        stages(tmp_path / "a", vit, words).prepare()
    with pytest.raises(TheLoomError, match="reads texts, and the corpus has images"):
        stages(tmp_path / "b", tiny_llama, requested("images", media["images"])).prepare()
    with pytest.raises(TheLoomError, match="need the column that holds its texts"):
        stages(tmp_path / "e", vit, requested("audio", media["audio"], side="decoder."))
    with pytest.raises(TheLoomError, match="reads images, and the corpus has texts"):
        stages(tmp_path / "c", vit, "corpus.max_tokens=100").prepare()
    (vit / "preprocessor_config.json").rename(vit / "elsewhere.json")
    try:
        with pytest.raises(TheLoomError, match=r"has no preprocessor_config\.json"):
            stages(tmp_path / "d", vit, requested("images", media["images"])).prepare()
    finally:
        (vit / "elsewhere.json").rename(vit / "preprocessor_config.json")


def test_other_images_of_the_same_size_are_no_pair(tmp_path, vit, media):
    shutil.copytree(media["images"], tmp_path / "images")
    (tmp_path / "images/image1.png").write_bytes(png())
    folders = {"one": media["images"], "same": media["images"], "other": tmp_path / "images"}
    one, same, other = (
        stages(tmp_path / name, vit, requested("images", folder)).all().activations
        for name, folder in folders.items()
    )
    assert len(theloom.open_pair(one, same)) == 5 * 17
    with pytest.raises(StoreError, match=r"document 'image1\.png' is a file of SHA-256"):
        theloom.open_pair(one, other)


def test_functions_of_token_ids_refuse_a_model_of_images(vit):
    with pytest.raises(TheLoomError, match=r"ViTModel reads images, and is given token ids"):
        extract_hidden_states(AutoModel.from_pretrained(vit), torch.arange(4)[None])


def test_memory_of_raw_sound_is_predicted_without_weights(tmp_path):
    found = forecast(str(build("wav2vec2", tmp_path / "model")), "fp32", windows=1, tokens=64)
    assert found.weights > 0
    assert found.layerwise is None
    assert "as a whole alone" in found.layerwise_unsupported


def test_the_processor_is_in_the_record_of_a_run(tmp_path, vit, media):
    run = stages(tmp_path / "run", vit, requested("images", media["images"])).all()
    with h5py.File(run.activations) as file:
        assert file.attrs["processor"].startswith("ViTImageProcessor")
        assert len(file.attrs["processor_hash"]) == 64
        columns = {f"documents/columns/{name}" for name in file["documents/columns"]}
    page = (ROOT / "workflow/docs/file-format.md").read_text(encoding="utf-8")
    named = set(re.findall(r"documents/columns/input_\w+", page))
    assert columns == named - {"documents/columns/input_images"}  # of conversations
