"""The examples in the docstrings of the library run."""

import doctest
import importlib
import shutil

import pytest
from support import ROOT

LIBRARY = ROOT / "workflow/theloom"
MODULES = [
    ".".join(("theloom", *file.relative_to(LIBRARY).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for file in sorted(LIBRARY.rglob("*.py"))
    if ">>>" in file.read_text(encoding="utf-8")
]
# What people import must show how it is used.
PUBLIC = ["theloom", "theloom.dataset.activations", "theloom.extraction.api"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, `results/tiny`."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "results/tiny").mkdir(parents=True)
    released = ROOT / "tests/released/activations-format-1-bf16.h5"
    shutil.copy(released, folder / "results/tiny/activations.h5")
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_have_an_example(name):
    assert name in MODULES
