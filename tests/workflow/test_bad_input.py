"""A user's mistake, through the real pipeline: one line that says what to do, a failing exit code,
no traceback.
"""

import pytest
from support import build_tiny


def fails(project, overrides, profiles="tiny"):
    done = project.snakemake(profiles=profiles, overrides=overrides)
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    return errors[0], printed


@pytest.fixture
def tiny(project, tiny_profile):
    tiny_profile(project)
    return project


@pytest.mark.parametrize(
    ("profiles", "overrides", "words"),
    [
        (
            "tiny",
            "memory.chunk_size=3",
            ["unknown key 'memory.chunk_size'", "streaming_chunk_size"],
        ),
        ("tiny", "memory.streaming_chunk_size=big", ["memory.streaming_chunk_size", "'big'"]),
        ("nine", "", ["unknown profile 'nine'", "smollm2-135m"]),
        (
            "smollm2-135m",
            "memory.activation_cache_filter=[blocks.31.hook_resid_pst]",
            ["'blocks.29.hook_resid_post'"],
        ),
        (
            "smollm2-135m",
            "memory.activation_cache_filter=[blocks.4?.*]",
            ["matches nothing", "30 blocks"],
        ),
        ("tiny,custom 7b", "", ["'custom 7b'", "commas between profiles"]),
        ("tiny", "memory", ["'memory'", "write key=value"]),
        (
            "tiny",
            "corpus.path=mine.txt",
            ["'mine.txt' is for corpus=text alone", "add corpus=text"],
        ),
        ("tiny", "corpus=texts", ["corpus=texts: there is no such corpus", "python-docs"]),
        (
            "tiny",
            "memory.activation_cache_filter=blocks.1.hook_resid_post",
            ["put brackets round it"],
        ),
        ("tiny", "corpus=text corpus.path=nowhere.txt", ["corpus.path", "'nowhere.txt'"]),
        ("custom", "model.source=./nowhere", ["model.source", "'./nowhere'"]),
        ("custom", "model.source=package:nowhere", ["model.source", "pip install"]),
        ("custom", "model.source=./pickled", ["pytorch_model.bin", "model.allow_pickle=true"]),
        ("custom", "model.source=./workflow", ["no safetensors and no GGUF"]),
    ],
)
def test_found_before_any_job_runs(tiny, profiles, overrides, words):
    build_tiny("llama", tiny.folder / "pickled")
    (tiny.folder / "pickled/model.safetensors").rename(tiny.folder / "pickled/pytorch_model.bin")
    error, printed = fails(tiny, overrides, profiles)
    for word in words:
        assert word in error
    assert "Job stats" not in printed
    assert not (tiny.folder / "results").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "memory.activation_cache_filter=[blocks.7.hook_resid_post]",
            ["'blocks.2.hook_resid_post'", "3 blocks"],
        ),
        ("corpus.max_tokens=100000000000000", ["GB", "free", "corpus.max_tokens"]),
        ("corpus=hub corpus.dataset=nobody/nothing", ["corpus.dataset", "nobody/nothing"]),
        ("corpus=text corpus.path={texts}/bad.txt", ["bad.txt, line 1", "not utf-8", "column"]),
        ("corpus=text corpus.path={texts}/empty.txt", ["no tokens", "1 documents read"]),
        ("corpus.context_length=100000", ["corpus.context_length", "256"]),
        (
            "model.source={texts}/other",
            ["model.architecture", "num_hidden_layers", "profiles=custom"],
        ),
    ],
)
def test_found_before_any_weight_is_loaded(tiny, tiny_llama, overrides, words):
    texts = tiny.folder / "texts"
    texts.mkdir()
    (texts / "bad.txt").write_bytes(b"good\xff")
    (texts / "empty.txt").touch()
    if "other" in overrides:
        other = build_tiny("llama", texts / "other", num_hidden_layers=2, vocab_size=49152)
        for file in tiny_llama.glob("tokenizer*"):
            (other / file.name).write_bytes(file.read_bytes())
        profile = tiny.folder / "config/profile/tiny.yaml"
        numbers = (
            "hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2, num_hidden_layers: 3"
        )
        numbers += ", intermediate_size: 96, vocab_size: 49152, max_position_embeddings: 256"
        profile.write_text(
            profile.read_text().replace("model:\n", f"model:\n  architecture: {{{numbers}}}\n")
        )
    error, _ = fails(tiny, overrides.format(texts=texts))
    for word in words:
        assert word in error
    assert not list((tiny.folder / "results").glob("*/model.h5"))
    assert not list((tiny.folder / "results").glob("*/shards/*"))


def test_empty_documents_are_skipped_and_counted(tiny):
    import theloom

    texts = tiny.folder / "texts"
    texts.mkdir()
    (texts / "a.txt").touch()
    (texts / "b.md").write_text("Not empty.")
    done = tiny.snakemake(profiles="tiny", overrides=f"name=some corpus=text corpus.path={texts}")
    assert done.returncode == 0, done.stdout + done.stderr
    acts = theloom.open(tiny.results("some") / "activations.h5")
    assert acts.documents == ["b.md"]
    assert acts.attributes["empty_documents"] == 1
    assert (
        "document a.txt has no tokens: skipped"
        in (tiny.results("some") / "logs/tokenize_corpus.log").read_text()
    )


def test_a_key_that_is_not_profiles_or_set_is_refused(tiny):
    done = tiny.snakemake("--config", "chunk=3")
    assert done.returncode != 0
    assert (
        "error: --config takes profiles, set and overrides, found chunk"
        in done.stdout + done.stderr
    )
