"""Docstrings of the library: their examples run, and they tell of arguments and results."""

import ast
import doctest
import importlib
import re
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


# An annotation of a function that returns nothing.
NOTHING = {"None", "Iterator[None]", "NoReturn", "Never"}


def _lacking(function: ast.FunctionDef) -> list[str]:
    """Parameters that a docstring does not tell of, or tells of in vain, and "Returns"."""
    doc, a = ast.get_docstring(function) or "", function.args
    if any("property" in ast.unparse(d) for d in function.decorator_list):
        return [] if doc else ["a docstring"]
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    told = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    names = set(re.findall(r"^ {4}\**(\w+):", told, re.MULTILINE))
    lacking = sorted(names ^ {p.arg for p in parameters if p.arg not in ("self", "cls")})
    returns = function.returns is not None and ast.unparse(function.returns) not in NOTHING
    if returns and not re.search(r"^(Returns|Yields):$", doc, re.MULTILINE):
        lacking.append("Returns")
    return lacking


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [f for f in node.body if isinstance(f, ast.FunctionDef)]


def _told_by_bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Names of the methods of a class that the library's classes it derives from document."""
    told: set[str] = set()
    for base in (ast.unparse(b).partition("[")[0] for b in node.bases):
        if base in classes:
            told |= {f.name for f in _methods(classes[base]) if not _lacking(f)}
            told |= _told_by_bases(classes[base], classes)
    return told


def _gaps(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> list[str]:
    """What the public functions of a module lack, and the public methods of its public classes.

    A method may be documented where a base class has it, or a protocol of the same module.
    """
    here = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    protocols = [c for c in here if any(ast.unparse(b) == "Protocol" for b in c.bases)]
    scopes = [("", [f for f in tree.body if isinstance(f, ast.FunctionDef)], set[str]())]
    for node in (c for c in here if not c.name.startswith("_")):
        told = {f.name for p in protocols if p is not node for f in _methods(p)}
        scopes.append((f"{node.name}.", _methods(node), told | _told_by_bases(node, classes)))
    return [
        f"{scope}{function.name} lacks {section}"
        for scope, functions, told in scopes
        for function in functions
        if not function.name.startswith("_") and function.name not in told
        for section in _lacking(function)
    ]


def test_functions_tell_of_their_arguments_and_results():
    files = sorted(LIBRARY.rglob("*.py"))
    trees = {str(f.relative_to(LIBRARY)): ast.parse(f.read_text(encoding="utf-8")) for f in files}
    classes = {n.name: n for t in trees.values() for n in t.body if isinstance(n, ast.ClassDef)}
    gaps = {name: found for name, tree in trees.items() if (found := _gaps(tree, classes))}
    assert gaps == {}
