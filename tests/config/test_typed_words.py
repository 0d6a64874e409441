"""What is typed arrives as it was typed, or one line refuses it: by `set`, by words, by a file."""

import os
import random
import shlex
import unicodedata

import pytest
import yaml
from support import ROOT
from theloom.config import compose, frozen, overrides_file, schema, values, words
from theloom.errors import ConfigError

LONG = bool(os.environ.get("LONG_TESTS"))
ODD = list("""'"#,=~()[]{}<>|&;:!?*%$@^`\\/+-_. \téßжλ中文🙂‍️ ­\u3000\u202e""")
TEXTS = sorted(k for k in schema.types() if values.is_text(k))
INTEGERS = sorted(k for k in schema.types() if int in values.members(k))


def odd_text(rng: random.Random, most: int = 24) -> str:
    """A text of characters that some parser may read as its own, and plain ones."""
    plain = "abcXYZ019"
    return "".join(
        rng.choice(ODD if rng.random() < 0.6 else plain) for _ in range(rng.randint(1, most))
    )


def as_yaml(key: str, value: str) -> str:
    return yaml.safe_dump({key: value}, allow_unicode=True)


def one_line(error: ConfigError) -> None:
    assert str(error).strip()
    assert len(str(error).splitlines()) == 1, error


def by_each_way(key, value, folder):
    """The values that a key has by `set`, by the words of a shell, by a file, and once encoded."""
    file = folder / "overrides.yaml"
    file.write_text(as_yaml(key, value), encoding="utf-8")
    word = f"{key}={value}"
    ways = {
        "set": lambda: words.from_text("'" + word.replace("'", "'\\''") + "'"),
        "quoted value": lambda: words.from_text(f"{key}='" + value.replace("'", "'\\''") + "'"),
        "double quotes": lambda: words.from_text(
            f'{key}="' + value.replace("\\", "\\\\").replace('"', '\\"') + '" verify.seed=1'
        )[:1],
        "words": lambda: words.from_words([word]),
        "file": lambda: overrides_file.read(file),
        "encoded": lambda: words.decoded(words.encoded(words.from_words([word]))),
    }
    for name, way in ways.items():
        try:
            (assignment,) = way()
        except ConfigError as error:
            one_line(error)
            yield name, ConfigError
        else:
            assert assignment.key == key, name
            yield name, assignment.values


@pytest.mark.parametrize("seed", range(4000 if LONG else 150))
def test_a_text_arrives_as_typed_or_one_line_refuses_it(seed, tmp_path):
    rng = random.Random(seed)
    key, value = rng.choice(TEXTS), odd_text(rng)
    refusable = "\t" in value or value == "???"
    for way, arrived in by_each_way(key, value, tmp_path):
        assert arrived == (ConfigError if refusable else (value,)), (way, value)


@pytest.mark.parametrize("seed", range(300 if LONG else 12))
def test_a_path_arrives_in_the_frozen_config_as_typed(seed, tmp_path):
    rng = random.Random(seed)
    name = odd_text(rng, 40).replace("/", "-").replace("\t", " ")
    name = "x" if name in (".", "..") else name
    folder = tmp_path / name
    folder.mkdir()
    title = odd_text(rng).replace("\t", "?!")
    typed = [f"corpus.path={folder}", "corpus=text", f"report.title={title}", "model.source=/m"]
    for overrides in (shlex.join(typed), words.from_words(typed)):
        (run,) = compose.runs(ROOT / "config", "custom", overrides).values()
        for stage, found in (("tokens", "corpus"), ("report", "report")):
            frozen.freeze(run.stage(stage), tmp_path / "stage.json")
            section = getattr(frozen.load_frozen(tmp_path / "stage.json"), found)
            expected = str(folder) if stage == "tokens" else title
            assert (section.path if stage == "tokens" else section.title) == expected
        assert len(run.name.encode()) <= 100
        assert frozen.to_plain(frozen.to_config(run.config))["report"]["title"] == title


@pytest.mark.parametrize("seed", range(2000 if LONG else 150))
def test_a_number_is_what_it_reads_like_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    digits = "".join(rng.choice("0123456789_,.eE+- '") for _ in range(rng.randint(1, 8)))
    for way, arrived in by_each_way("corpus.max_tokens", digits, tmp_path):
        if arrived is ConfigError:
            continue
        parts = digits.split(",") if way not in ("file", "quoted value", "double quotes") else None
        for got, typed in zip(arrived, parts or [digits], strict=True):
            assert got.lstrip("+-").isdecimal(), (way, digits)
            assert got == typed.strip("' "), (way, digits)
            assert not (got.lstrip("+-").startswith("0") and len(got.lstrip("+-")) > 1)


@pytest.mark.parametrize("seed", range(2000 if LONG else 60))
def test_any_words_end_in_runs_or_in_one_line(seed):
    rng = random.Random(seed)
    keys = [*schema.types(), "corpus", "profile", "a.b", "", "~name", "+verify.seed", "memory"]
    parts = [
        f"{rng.choice(keys)}{rng.choice(['=', '=', '=', '', '=['])}{odd_text(rng, 6)}"
        for _ in range(rng.randint(1, 3))
    ]
    for read in (lambda: words.from_text(" ".join(parts)), lambda: words.from_words(parts)):
        try:
            compose.runs(ROOT / "config", "custom", read())
        except ConfigError as error:
            one_line(error)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("name=2024_01_15", {"name": ("2024_01_15",)}),
        ("model.revision=1234e56", {"model.revision": ("1234e56",)}),
        ("model.revision=null", {"model.revision": (None,)}),
        ("corpus.path='/a/my texts'", {"corpus.path": ("/a/my texts",)}),
        ("corpus.path=/a/b\\ c", {"corpus.path": ("/a/b c",)}),
        ("'corpus.path=/a/b c'", {"corpus.path": ("/a/b c",)}),
        ("corpus.path='/a,b'", {"corpus.path": ("/a,b",)}),
        ("corpus.path=/a,/b", {"corpus.path": ("/a", "/b")}),
        ("name=a name=b", {"name": ("a", "b")}),
        ("report.title='a #1, '\"it's\"", {"report.title": ("a #1, it's",)}),
        (
            "memory.activation_cache_filter=[a, b]",
            {"memory.activation_cache_filter": (("a", "b"),)},
        ),
        (
            "memory.activation_cache_filter=[a],[b,'c,d']",
            {"memory.activation_cache_filter": (("a",), ("b", "c,d"))},
        ),
        (
            "memory.activation_cache_filter=[blocks.[0-3].x]",
            {"memory.activation_cache_filter": (("blocks.[0-3].x",),)},
        ),
        ("memory.activation_cache_filter=[]", {"memory.activation_cache_filter": ((),)}),
        ("verify.seed=1,2\n name=x", {"verify.seed": ("1", "2"), "name": ("x",)}),
        ("+verify.seed=1", {"verify.seed": ("1",)}),
        ("", {}),
    ],
)
def test_the_words_of_set(typed, found):
    assert {a.key: a.values for a in words.from_text(typed)} == found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("corpus.max_tokens=200,000", "'200,000' is not an integer; write 200000"),
        ("corpus.max_tokens=200_000", "'200_000' is not an integer; write 200000"),
        ("corpus.max_tokens=1e5", "write 100000"),
        ("corpus.max_tokens=many", "write digits alone"),
        ("corpus.max_tokens=" + "9" * 5000, "more than 18 digits"),
        ("memory.memory_warning_threshold=nan", "not a number"),
        ('memory.activation_cache_filter=[""]', "an entry of the list is empty"),
        ("memory.activation_cache_filter=[a,]", "an entry of the list is empty"),
        ("memory.activation_cache_filter=a,b", "put brackets round it"),
        ("corpus.path=", "corpus.path: no value"),
        ("verify.seed=1 verify.seed=2", "verify.seed: given twice"),
        ("corpus.path=/my texts", "quotes round a value"),
        ("report.title=it's", "close each quote"),
        ("report.title='a\nb'", "line breaks"),
    ],
)
def test_what_cannot_be_meant_is_one_line(typed, said):
    with pytest.raises(ConfigError) as caught:
        words.from_text(typed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_exists_with_its_comma_is_that_path(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert words.from_text(f"corpus.path={tmp_path}/a,b")[0].values == (f"{tmp_path}/a,b",)
    assert len(words.from_text(f"corpus.path={tmp_path}/a,c")[0].values) == 2


def test_a_file_of_keys_nested_or_dotted_typed_by_the_schema(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: 2024_01_15\ncorpus: text\ncorpus.path: ~/my texts,#1\n"
        "model: {revision: 1234e56, tokenizer: ~}\nreport.title: yes\n"
        "memory:\n  precision_mode: [fp32, bf16]\n  activation_cache_filter: ['a,b', c]\n"
        "verify.seed: 7\n"
    )
    assert {a.key: a.values for a in overrides_file.read(file)} == {
        "name": ("2024_01_15",),
        "corpus": ("text",),
        "corpus.path": ("~/my texts,#1",),
        "model.revision": ("1234e56",),
        "model.tokenizer": (None,),
        "report.title": ("yes",),
        "memory.precision_mode": ("fp32", "bf16"),
        "memory.activation_cache_filter": (("a,b", "c"),),
        "verify.seed": ("7",),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- a", "not a mapping"),
        ("verify: {sed: {a: 1}}", "unknown key 'verify.sed'"),
        ("verify.seed: 1\nverify: {seed: 2}", "twice"),
        ("verify.seed: 1_0", "write 10"),
        ("memory.activation_cache_filter: a", "brackets"),
        ("memory.activation_cache_filter: [[[a]]]", "two levels"),
        ("verify.seed: []", "verify.seed"),
        ("verify: &v {seed: *v}", "verify.seed"),
        ("--- 1\n--- 2", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        overrides_file.read(tmp_path / "x.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "x" * 300, "~nobody-here/x"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
    path = tmp_path / name if "~" not in name else type(tmp_path)(name)
    with pytest.raises(ConfigError, match="cannot be read"):
        overrides_file.read(path)


def test_later_sources_win():
    first, second = words.from_text("name=a verify.seed=1,2"), words.from_words(["verify.seed=3"])
    assert {a.key: a.values for a in words.merged(first, second)} == {
        "name": ("a",),
        "verify.seed": ("3",),
    }


@pytest.mark.parametrize("text", ["", "x", "é", "WzFd"])
def test_what_was_not_encoded_is_refused(text):
    with pytest.raises(ConfigError, match="only theloom run passes typed"):
        words.decoded(text)


def test_odd_characters_hold_each_sort_that_a_parser_may_read():
    assert {unicodedata.category(c)[0] for c in ODD} >= {"P", "S", "Z", "C", "L"}
