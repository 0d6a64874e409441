"""Every command and snippet of README.md and the docs, as extracted from the files.

Python blocks run in a folder that has a run at `results/smollm2-135m`; YAML blocks are composed
into a config; `theloom` commands run; `snakemake` and `make` commands are followed up to a dry run,
which composes the config and plans every job. A block that cannot run here is marked: `<!-- not run
in tests: why -->` on the line before.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT, build_tiny, copy_project, stages
from theloom.cli import main
from theloom.config import compose

PAGES = [
    ROOT / "README.md",
    ROOT / "config/README.md",
    *sorted((ROOT / "workflow/docs").rglob("*.md")),
]
EXAMPLES = sorted((ROOT / "workflow/docs/examples").glob("*.py"))
MARK = re.compile(r"<!-- not run in tests: (.+) -->")
COMMANDS = ("make ", ".venv/bin/", "snakemake ", "theloom ")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that are not marked."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("```"))
            if not (number and MARK.search(lines[number - 1])):
                language = lines[number].strip("`").strip()
                found.append(Block(page, number + 1, language, "\n".join(lines[number + 1 : end])))
            number = end
        number += 1
    return found


def commands() -> list[tuple[str, str]]:
    """Where, and which command: of the pages' blocks, and of the indented lines of the examples'
    docstrings.
    """
    found = [
        (f"{block}", line.split("  #")[0].strip())
        for page in PAGES
        for block in blocks(page)
        if block.language in ("", "bash", "sh")
        for line in block.text.splitlines()
        if line.startswith(COMMANDS)
    ]
    for example in EXAMPLES:
        docstring = example.read_text(encoding="utf-8").split('"""')[1]
        lines = [line.strip() for line in docstring.splitlines() if line.startswith("    ")]
        found += [
            (str(example.relative_to(ROOT)), line) for line in lines if line.startswith(COMMANDS)
        ]
    return list({command: (where, command) for where, command in reversed(found)}.values())[::-1]


def of_language(language: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory, smollm2):
    """A copy of the project with texts, a model, and a run that has the default's name, hook points
    and corpus.
    """
    project = copy_project(tmp_path_factory.mktemp("docs"))
    model = build_tiny(
        "llama", project.folder / "model", vocab_size=49152, num_hidden_layers=30, hidden_size=32
    )
    for file in smollm2.folder.glob("tokenizer*"):
        shutil.copy(file, model)
    shutil.copy(ROOT / "Makefile", project.folder)
    (project.folder / "my texts").mkdir()
    (project.folder / "my texts/one.txt").write_text("Some text.", encoding="utf-8")
    hooks = ",".join(f"blocks.{n}.hook_resid_post" for n in (5, 15, 29))
    requested = f"memory.activation_cache_filter=[{hooks}] corpus.max_tokens=4096"
    stages(project.folder / "results/smollm2-135m", model, requested).all()
    return project


def test_there_are_commands_and_snippets_of_each_sort():
    found = [command.split()[0] for _, command in commands()]
    assert {"make", ".venv/bin/theloom", ".venv/bin/snakemake"} <= set(found)
    assert len(of_language("python")) >= 5
    assert len(of_language("yaml")) >= 3


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_snippets_run(block, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_snippets_are_valid_configs(block, place):
    profile = place.folder / "config/profile/documented.yaml"
    profile.write_text(f"# @package _global_\n{block.text}\n", encoding="utf-8")
    try:
        (run,) = compose.runs(place.folder / "config", "documented", "model.source=a/b").values()
    finally:
        profile.unlink()
    assert run.config["model"]["source"] == "a/b"


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value[:60])
def test_commands_run(where, command, place, monkeypatch):
    words = shlex.split(
        command.replace("/path/to/model", "model").replace("/path/to/texts", "'my texts'")
    )
    monkeypatch.chdir(place.folder)
    if words[0].endswith("theloom"):
        assert main.main(words[1:]) == 0, where
    elif words[0].endswith("python") and words[1].startswith("workflow/docs/examples/"):
        assert (ROOT / words[1]).is_file(), where  # tests/docs/test_examples.py runs them
        if "--texts" in words:
            subprocess.run([sys.executable, *words[1:]], check=True)
    elif words[0].endswith("python"):
        assert "pytest" in words, where
        assert (ROOT / words[-1]).exists(), where
    else:
        for arguments in _snakemake_calls(words, place.folder):
            done = place_snakemake(place, arguments)
            assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"


def _snakemake_calls(words: list[str], folder: Path) -> list[list[str]]:
    """The arguments that a command gives to snakemake: those of make are what `make -n` would run."""
    if words[0] != "make":
        return [words[1:]]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / "pyproject.toml").touch()
    (folder / ".venv/complete").touch()  # the environment is that of the tests
    said = subprocess.run(
        ["make", "-n", *words[1:]], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert said.returncode == 0, said.stderr
    calls = [
        shlex.split(line)[1:]
        for line in said.stdout.splitlines()
        if line.startswith(".venv/bin/snakemake")
    ]
    return [call for call in calls if "--lint" not in call and "--report" not in call]


def place_snakemake(place, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    at = arguments.index("--config") if "--config" in arguments else len(arguments)
    dry = [
        *arguments[:at],
        *(["--dry-run", "--quiet", "all"] if "--dry-run" not in arguments else []),
        *arguments[at:],
    ]
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *dry],
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def anchors(page: Path) -> set[str]:
    """The names by which a link reaches a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


def test_every_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
            ahead += [
                (page.parent / link).resolve() for link in links if not link.startswith("http")
            ]
    assert {page.resolve() for page in PAGES} <= {page.resolve() for page in seen}


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) < 12_000, (
        "move reference material to workflow/docs"
    )


def test_the_page_for_contributors_names_every_module():
    page = (ROOT / "workflow/docs/architecture.md").read_text(encoding="utf-8")
    modules = {file.stem for file in (ROOT / "workflow/theloom").glob("*.py")} - {"__init__"}
    named = set(
        re.findall(
            r"`(\w+)`",
            page[page.index("## Which module to open") : page.index("## Rules that hold")],
        )
    )
    assert named == modules
