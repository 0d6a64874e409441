"""What a call of Snakemake requests, from the arguments as they were typed."""

import re
import shlex
import subprocess

import pytest
from theloom.config.words import from_words
from theloom.errors import ConfigError
from theloom.pipeline import request


def found(*typed: str, **config: object) -> dict[str, tuple]:
    return {a.key: a.values for a in request.read(config, typed).assignments}


def test_arguments_are_read_as_they_were_typed():
    """Snakemake's own reading strips quotes at both ends, and cuts at ` #`."""
    read = request.read(
        {"profiles": 7, "set": "name=x"}, ["profiles=007", "set=name='a' # b=c"][:1]
    )
    assert read.profiles == "007"
    assert found("set=report.title='a # b'") == {"report.title": ("a # b",)}
    assert found("set='report.title=a # b'") == {"report.title": ("a # b",)}


def test_a_config_file_s_values_count_where_nothing_was_typed():
    assert found(set="verify.seed=1") == {"verify.seed": ("1",)}
    assert found("set=verify.seed=2", set="verify.seed=1") == {"verify.seed": ("2",)}


def test_words_go_before_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("verify.seed: 1\nreport.title: 1e5\n")
    merged = {"verify.seed": ("2",), "report.title": ("1e5",)}
    assert found(f"overrides={tmp_path}/x.yaml", "set=verify.seed=2") == merged
    read = request.of_words(None, ["verify.seed=2"], [tmp_path / "x.yaml"])
    assert {a.key: a.values for a in read.assignments} == merged


@pytest.mark.parametrize(
    ("typed", "config", "said"),
    [
        (["set=name=a", "set=name=b"], {}, "set=: given twice"),
        (["chunk=3"], {}, "takes profiles, set and overrides, found chunk"),
        ([], {"set": 5}, "set takes text, found 5"),
        (["typed=x"], {}, "only theloom run passes typed"),
        (["overrides="], {}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(typed, config, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        request.read(config, typed)


def test_what_jobs_get_passes_a_shell_unchanged():
    """Snakemake writes the arguments into a job's command line by repr."""
    words = [
        "report.title=$HOME `id` 'a' \"b\" \\ # é 🙂",
        "memory.activation_cache_filter=[a],[b]",
    ]
    asked = request.Request("3b,7b", tuple(from_words(words)))
    line = " ".join(repr(argument) for argument in asked.arguments())
    shell = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True)
    assert shell.stdout.splitlines() == asked.arguments() == shlex.split(line)
    assert request.read({}, shell.stdout.splitlines()) == asked
