"""The examples in the docstrings of store, dataset and corpus run."""

import doctest
import importlib
import pkgutil
import shutil

import pytest
import theloom.corpus
import theloom.dataset
import theloom.store
from support import ROOT

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (theloom.store, theloom.dataset, theloom.corpus)
    for module in pkgutil.iter_modules(package.__path__)
]


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
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in MODULES for t in finder.find(importlib.import_module(name))]
    assert sum(bool(t.examples) for t in tests) >= 8
