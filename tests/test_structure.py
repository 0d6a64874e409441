"""The packages of the library import in one direction."""

import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter

from support import ROOT

LIBRARY = ROOT / "workflow/theloom"
LOWEST = ("credentials", "errors", "precision", "terminal")
PACKAGES = [
    "rows",
    "devices",
    "config",
    "hooks",
    "model",
    "store",
    "remote",
    "dataset",
    "pairs",
    "exports",
    "corpus",
    "memory",
    "planning",
    "engine",
    "answers",
    "extraction",
    "verification",
    "report",
    "pipeline",
    "cli",
]
RANK = dict.fromkeys(LOWEST, 0) | {name: n for n, name in enumerate(PACKAGES, 1)}


def _imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("theloom.")}


def test_no_import_runs_against_the_order_of_packages():
    against = []
    for file in sorted(LIBRARY.rglob("*.py")):
        path = file.relative_to(LIBRARY)
        package = path.parts[0].removesuffix(".py")
        if len(path.parts) == 1 and package not in LOWEST:
            continue
        for name in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            low = package in LOWEST and name not in LOWEST
            if name not in RANK or low or RANK[name] > RANK[package]:
                against.append(f"{path} imports {name}")
    assert not against


def test_no_folder_has_too_many_modules():
    for folder in {file.parent for file in LIBRARY.rglob("*.py")}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= (8 if folder == LIBRARY else 14), folder


def test_package_inits_are_empty_but_for_those_that_users_import():
    for file in LIBRARY.rglob("__init__.py"):
        if file.parent not in (LIBRARY, LIBRARY / "extraction", LIBRARY / "exports"):
            assert not file.read_text(encoding="utf-8").strip(), file


def test_no_modules_import_each_other_in_a_circle():
    files = {
        ".".join(("theloom", *file.relative_to(LIBRARY).with_suffix("").parts)): file
        for file in LIBRARY.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    graph[name].add(module if module in files else node.module)
    TopologicalSorter({name: graph[name] & set(files) for name in files}).prepare()


def test_two_modules_alone_speak_to_torch_cuda():
    speaking = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "workflow").rglob("*.*")
        if file.suffix in (".py", ".smk", ".md", ".yaml")
        and "torch.cuda" in file.read_text(encoding="utf-8")
    }
    seam = ("accelerator.py", "streams.py")
    assert speaking == {f"workflow/theloom/devices/{name}" for name in seam}


def test_files_that_python_finds_by_their_name_alone_have_one_of_their_own():
    folders = [ROOT / "tests", ROOT / "workflow/bench"]
    files = (file for folder in folders for file in folder.rglob("*.py"))
    names = Counter(f.stem for f in files if not (f.parent / "__init__.py").exists())
    assert [name for name, count in names.items() if count > 1] == []
    assert not names.keys() & sys.stdlib_module_names
