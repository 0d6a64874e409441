"""Images and audio in data sets of the hub: rows are those of the files themselves."""

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import theloom
from hub_support import RUN_STAGES, hub, run_on
from support import stages
from theloom.errors import ConfigError, CorpusError
from towers_support import build, plain_states, write_media

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def requested(kind, dataset, more=""):
    return (
        f"corpus={kind} corpus.dataset={dataset} corpus.max_tokens=null extraction.shards=2 "
        f"memory.activation_cache_filter=[blocks.*.hook_resid_post] {more}"
    )


def table_of(folder, kind, file):
    """Write a table as `push_to_hub` of datasets does: an object with the bytes in each cell."""
    files = sorted(folder.iterdir())
    feature = datasets.Image() if kind == "images" else datasets.Audio()
    column = kind.removesuffix("s")
    cells = [{"bytes": one.read_bytes(), "path": one.name} for one in files]
    features = datasets.Features({column: feature, "mood": datasets.ClassLabel(names=["a", "b"])})
    moods = [number % 2 for number in range(len(files))]
    schema = features.arrow_schema
    table = pa.table({column: cells, "mood": pa.array(moods)}).cast(schema)
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table, file)
    return files


def check(activations, model, kind, files, begin):
    acts = theloom.open(activations)
    assert [acts.document(n).id for n in range(5)] == [f"{begin}/{n}" for n in range(5)]
    for number, file in enumerate(files):
        expected = plain_states(model, "vit" if kind == "images" else "wav2vec2", file)
        for hook in acts.hooks:
            found = acts.document(number)[hook]
            assert (found - expected[hook]).abs().max() <= 1e-5 * expected[hook].abs().max()


@pytest.mark.parametrize(("kind", "model_type"), [("images", "vit"), ("audio", "wav2vec2")])
def test_rows_of_a_data_set_of_the_hub_are_those_of_its_files(tmp_path, kind, model_type):
    media, model = write_media(tmp_path / "media", kind), build(model_type, tmp_path / "model")
    files = table_of(media, kind, tmp_path / "repo/data/train-00000-of-00001.parquet")
    words = requested(kind, "user/name", "corpus.columns=[mood]")
    with hub() as server:
        server.add(tmp_path / "repo")
        done = run_on(server, tmp_path, "-c", RUN_STAGES, str(tmp_path / "run"), str(model), words)
    assert done.returncode == 0, done.stderr
    assert server.unknown == []
    check(tmp_path / "run/activations.h5", model, kind, files, "user/name/train")
    acts = theloom.open(tmp_path / "run/activations.h5")
    assert acts.columns["mood"].array().tolist() == ["a", "b", "a", "b", "a"]


def test_a_folder_that_datasets_reads_has_the_rows_of_its_files(tmp_path):
    media, model = write_media(tmp_path / "media", "images"), build("vit", tmp_path / "model")
    run = stages(tmp_path / "run", model, requested("images", media)).all()
    check(run.activations, model, "images", sorted(media.iterdir()), "train")


def test_a_table_names_no_file_of_this_machine(tmp_path):
    model, file = build("vit", tmp_path / "model"), tmp_path / "data/train.parquet"
    outside = write_media(tmp_path / "media", "images") / "image0.png"
    file.parent.mkdir()
    pa.parquet.write_table(pa.table({"image": [{"bytes": None, "path": str(outside)}]}), file)
    run = stages(tmp_path / "run", model, requested("images", file))
    with pytest.raises(CorpusError, match=r"names .*image0\.png, which is no file of the data set"):
        run.prepare()


def test_a_data_set_that_has_changed_stops_the_run(tmp_path):
    media, model = write_media(tmp_path / "media", "images"), build("vit", tmp_path / "model")
    file = tmp_path / "data/train.parquet"
    table_of(media, "images", file)
    run = stages(tmp_path / "run", model, requested("images", file))
    run.prepare()
    (media / "image1.png").write_bytes((media / "image0.png").read_bytes())
    file.unlink()
    file.parent.rmdir()
    table_of(media, "images", file)
    with pytest.raises(CorpusError, match="has changed since its rows were counted"):
        run.extract()


def test_files_are_in_a_path_or_in_a_data_set(tmp_path):
    words = f"{requested('images', 'user/name')} corpus.path={tmp_path}"
    with pytest.raises(ConfigError, match="the files are in one of them; take the other out"):
        stages(tmp_path / "run", tmp_path, words)
