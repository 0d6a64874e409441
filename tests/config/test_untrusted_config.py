"""Profiles and values from somebody else: none reads the environment, holds a secret, or fills the
memory.
"""

import shutil
import string

import pytest
from support import ROOT
from theloom.config import compose, overrides_file
from theloom.config.schema import key_table
from theloom.credentials import has_credential, hidden
from theloom.errors import ConfigError, TheLoomError

PASSWORD = "pa55word-of-mine"
TAIL = string.ascii_letters[:20] + "0123456789"
TOKENS = [
    f"hf_{TAIL}",
    f"ghp_{TAIL}",
    f"github_pat_{TAIL}",
    f"glpat-{TAIL}",
    f"sk-{TAIL}",
    f"sk-proj-{TAIL}",
    f"sk-ant-api03-{TAIL}",
    "AKIA" + TAIL[:16].upper(),
    f"xoxb-{TAIL}",
    f"https://me:{PASSWORD}@example.com/data",
    f"https://{TAIL}@example.com/data",
    f"me:{PASSWORD}@example.com",
    f"https://example.com/data?token={TAIL}",
    f"https://example.com/data?X-Amz-Signature={TAIL}",
]
PLAIN = [
    "/data/hf_models/sk-learn-experiments-2024",
    "hf_transformers/pypi-packages-of-a-mirror",
    "org/glove-embeddings-six-billion",
    "git@github.com:org/model",
    "hf://datasets/org/name@main/file.parquet",
    "0123456789abcdef0123456789abcdef01234567",
    "blocks.*.attn.hook_q",
]


@pytest.fixture
def profiles(tmp_path):
    """Composes a profile of this text, in a copy of the config."""
    folder = shutil.copytree(ROOT / "config", tmp_path / "config")

    def composed(text, overrides=""):
        (folder / "profile/theirs.yaml").write_text(f"# @package _global_\n{text}\n")
        (run,) = compose.runs(folder, "theirs", overrides).values()
        return run.config

    return composed


def one_line(profiles, text, overrides=""):
    with pytest.raises(ConfigError) as caught:
        profiles(text, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("model.source", "oc.env:MINE"),
        ("report.title", "oc.env:NONE,x"),
        ("corpus.split", "oc.decode:1"),
        ("report.title", "hydra:job.name"),
    ],
)
def test_no_value_of_a_profile_calls_a_resolver(profiles, monkeypatch, key, call):
    monkeypatch.setenv("MINE", PASSWORD)
    section, leaf = key.split(".")
    said = one_line(profiles, f"{section}: {{{leaf}: 'a ${{{call}}} b'}}", "model.source=/m")
    assert "theirs.yaml" in said
    assert "calls a resolver" in said
    assert PASSWORD not in said


def test_a_resolver_is_found_where_its_name_is_made_or_in_the_defaults(profiles):
    made = "report: {map_hook: env, title: '${oc.${report.map_hook}:HOME}'}"
    assert "calls a resolver" in one_line(profiles, made, "model.source=/m")
    chosen = "defaults:\n  - override /corpus: '${oc.env:HOME}'"
    assert "calls a resolver" in one_line(profiles, chosen, "model.source=/m")


def test_a_key_may_refer_to_another_and_a_typed_text_is_taken_as_it_is(profiles):
    text = "model: {source: /m}\nreport: {title: '${model.source}'}"
    assert profiles(text)["report"]["title"] == "/m"
    typed = profiles(text, "report.title='${oc.env:HOME}'")
    assert typed["report"]["title"] == "${oc.env:HOME}"


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        *(("corpus.dataset", secret) for secret in TOKENS),
        ("model.source", TOKENS[9]),
        ("report.title", TOKENS[4]),
        ("name", TOKENS[0]),
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_repeated(profiles, key, secret):
    corpus = "corpus=hub" if key == "corpus.dataset" else ""
    said = one_line(profiles, "model: {source: /m}", f"{corpus} {key}='{secret}'")
    assert said.startswith(key)
    assert "looks like a password or a token" in said
    for part in (TAIL, TAIL[:16].upper(), PASSWORD):
        assert part not in said


def test_a_secret_in_a_list_or_a_profile_is_refused_too(profiles):
    listed = f"memory: {{activation_cache_filter: [hf_{TAIL}]}}"
    assert "looks like" in one_line(profiles, listed, "model.source=/m")
    assert "looks like" in one_line(profiles, f"model: {{source: 'https://a:{TAIL}@h/x'}}")


@pytest.mark.parametrize("text", PLAIN)
def test_names_and_paths_are_no_secrets(text):
    assert not has_credential(text)
    assert hidden(text) == text


def test_no_error_of_ours_repeats_a_password_or_has_two_lines():
    error = str(TheLoomError(f"https://me:{PASSWORD}@example.com/x: not found\nat all"))
    assert error == "https://***@example.com/x: not found at all"


@pytest.mark.parametrize(
    ("key", "word"),
    [
        *(("resources.constraint", w) for w in ("a&reboot", "`id`", "a b", "-x", "a;b", "a|b")),
        ("resources.gpu_model", "$(id)"),
        ("resources.gpu_model", "a'b"),
    ],
)
def test_words_of_commands_have_a_safe_alphabet(profiles, key, word):
    quoted = word.replace("'", "\\'") if "'" in word else f"'{word}'"
    said = one_line(profiles, "model: {source: /m}", f"{key}={quoted}")
    assert said.startswith(f"{key}: ")
    assert "goes into commands of a scheduler" in said


def test_usual_words_of_commands_are_taken(profiles):
    overrides = "resources.gpu_model=NVIDIA-A100-SXM4-80GB resources.constraint=gpu80gb"
    found = profiles("model: {source: /m}", overrides)["resources"]
    assert (found["gpu_model"], found["constraint"]) == ("NVIDIA-A100-SXM4-80GB", "gpu80gb")


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "more than 100,000 values"),
        ("memory: {activation_cache_filter: &a [*a]}", "nested too deeply"),
        ("a: " + "[" * 500 + "]" * 500, "nested too deeply"),
        ("report: {title: " + "x" * (1 << 20) + "}", "more than 1,048,576 bytes"),
        ("verify: {seed: " + "9" * 5000 + "}", "theirs: cannot be read"),
        ("verify: {seed: " + "9" * 30 + "}", "verify.seed: 9"),
        ("report: {title: !!python/object/apply:os.getcwd []}", "could not determine"),
        ("model: {source: /a}\nmodel: {source: /b}", "duplicate key"),
        ('report: {title: "two\\nlines"}', "report.title"),
        ('report: {title: "half \\ud800"}', "report.title"),
    ],
)
def test_a_hostile_profile_is_one_line(profiles, text, words):
    assert words in one_line(profiles, text, "model.source=/m")


def test_aliases_of_an_overrides_file_are_counted_too(tmp_path):
    (tmp_path / "x.yaml").write_text(ALIASES)
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        overrides_file.read(tmp_path / "x.yaml")


def test_the_documentation_of_keys_holds_no_secret():
    assert not has_credential(key_table())
