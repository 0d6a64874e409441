"""Names of runs are short, stable, and different for different overrides."""

import random
import shutil

import pytest
from support import ROOT
from test_typed_words import odd_text
from theloom.config import compose, names, words
from theloom.errors import ConfigError

CONFIG = ROOT / "config"


def test_a_short_name_is_the_profile_and_the_overrides():
    assert names.run_name("tiny", []) == "tiny"
    typed = ["memory.precision_mode=bf16", "corpus.max_tokens=50"]
    assert names.run_name("tiny", typed) == "tiny+precision_mode=bf16+max_tokens=50"


def test_a_long_name_keeps_plain_parts_and_ends_on_a_hash():
    typed = [f"model.source=/{'x' * 300}", "corpus.max_tokens=50", "corpus.path=/my texts"]
    name = names.run_name("custom", typed)
    assert len(name) <= names.SHORT
    assert name.startswith("custom+max_tokens=50+")
    others = [names.run_name("custom", [typed[0] + "y", *typed[1:]]), names.run_name("tiny", typed)]
    assert len({name, *others}) == 3


def test_a_point_of_a_sweep_has_the_name_that_it_has_alone():
    fixed = f"model.source=/m corpus=text corpus.path='/{'long ' * 30}' extraction.shards=3"
    swept = compose.runs(CONFIG, "custom", f"{fixed} verify.seed=1,2")
    alone = compose.runs(CONFIG, "custom", f"{fixed} verify.seed=2")
    assert list(alone) == list(swept)[1:]
    assert all("seed=" in name and len(name) <= names.SHORT for name in swept)


def test_many_varied_keys_of_a_named_run_stay_short():
    keys = ["corpus.max_tokens", "corpus.max_documents", "verify.documents"]
    runs = compose.runs(
        CONFIG,
        "custom",
        f"name=mine model.source=/m {' '.join(f'{k}=100000,200000' for k in keys)}",
    )
    assert len(runs) == 8
    assert all(name.startswith("mine+") and len(name) <= names.SHORT for name in runs)


@pytest.mark.parametrize("seed", range(5))
def test_different_overrides_never_share_a_name(seed):
    rng = random.Random(seed)
    typed = set()
    while len(typed) < 300:
        value = odd_text(rng, rng.choice((3, 3, 90))).replace("\t", "-")
        typed.add((f"report.title={value}",) + (f"verify.seed={rng.randint(0, 3)}",) * (seed % 2))
    made = {names.run_name("tiny", overrides): overrides for overrides in typed}
    assert len(made) == len(typed)
    for name in made:
        names.check(name)
        assert len(name.encode()) <= names.SHORT


def test_a_value_that_looks_like_a_hashed_one_has_a_name_of_its_own():
    hashed = names.run_name("tiny", ["report.title=a b"])
    title = hashed.partition("title=")[2]
    assert names.run_name("tiny", [f"report.title={title}"]) != hashed


def test_a_profile_with_an_odd_name_composes(tmp_path):
    folder = shutil.copytree(CONFIG, tmp_path / "config")
    for odd in ("é (1)", "it's", "a+b=1", "back\\"):
        shutil.copy(folder / "profile/7b.yaml", folder / f"profile/{odd}.yaml")
        (run,) = compose.runs(folder, odd).values()
        assert run.profile == odd
        names.check(run.name)
        assert run.name != odd


@pytest.mark.parametrize(
    "name", ["a/b", "..", "a..b", "-a", "é", "a b", "a\tb", "x" * 101, "{run}", "_runs", ".", "a,b"]
)
def test_a_name_that_is_no_folder_s_is_refused_in_one_line(name):
    with pytest.raises(ConfigError) as caught:
        compose.runs(CONFIG, "7b", words.from_words([f"name={name}"]))
    assert "name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_of_the_user_s_is_kept():
    for name in ("2024_01_15", "1e3", "true", "x" * 100):
        assert list(compose.runs(CONFIG, "7b", f"name={name}")) == [name]


def test_keys_that_decide_no_row_are_in_a_name_only_where_they_vary():
    plain, smaller = (
        list(compose.runs(CONFIG, "custom", f"model.source=/m {more}"))
        for more in ("", "extraction.batch_tokens=64 resources.mem_mb=9000")
    )
    assert plain == smaller
    varied = compose.runs(CONFIG, "custom", "model.source=/m extraction.batch_tokens=64,128")
    assert [name.rpartition("+")[2] for name in varied] == ["batch_tokens=64", "batch_tokens=128"]
