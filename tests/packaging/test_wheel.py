"""The wheel, installed outside the repository: the command line, `theloom init`, and a run."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import theloom
from support import ROOT, copy_project
from theloom.config import locations


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and with the other packages of the tests' own."""

    bin: Path
    folder: Path

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=1800,
            env=environment | {"PATH": f"{self.bin}{os.pathsep}{environment['PATH']}"},
        )

    def python(self, source: str, cwd: Path | None = None) -> str:
        done = self.run("python", "-c", source, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as a user's pip does: from the source distribution."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "source"
    copy.mkdir()
    copy_project(copy)
    library = copy / "workflow/theloom"
    library.unlink()  # the build writes into it
    shutil.copytree(ROOT / "workflow/theloom", library, ignore=shutil.ignore_patterns("*.pyc*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "config/profile/.7b.yaml.swp").touch()
    sdist = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    pip = ["-m", "pip", "wheel", *offline, f"theloom-{theloom.__version__}.tar.gz"]
    for command, cwd in ((["-c", sdist], copy), (pip, folder)):
        done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("theloom-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    bin_folder = folder / "venv/bin"
    site = folder / "venv/lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python")]
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run([*pip, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Other packages come from the tests' own environment. Its .pth files are not read, so that its
    # editable theloom stays out.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Installed(bin_folder, folder / "empty")


@pytest.fixture(scope="module")
def made(installed) -> Path:
    """A project of `theloom init`, and what it printed."""
    done = installed.run("theloom", "init", "../my project")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("theloom run")
    assert "next: cd '../my project'" in done.stdout
    return installed.folder.parent / "my project"


@pytest.fixture(scope="module")
def finished(made, installed, tiny_llama) -> tuple[Path, str]:
    """The activations of a run with a profile of the user's, and what Snakemake printed."""
    small = "corpus.max_tokens=600 memory.streaming_chunk_size=64 extraction.shards=1"
    overrides = f"model.source={tiny_llama} extraction.device=cpu name=small {small}"
    shutil.copy(made / "config/profile/custom.yaml", made / "config/profile/mine.yaml")
    command = ["python", "-m", "snakemake", "--profile", "workflow/profiles/local"]
    done = installed.run(*command, "--config", "profiles=mine", f"set={overrides}", cwd=made)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    (activations,) = (made / "results").glob("*/activations.h5")
    return activations, printed


def test_a_wheel_holds_the_project_files_once_and_no_residue(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packaged = sorted(n.partition("_project/")[2] for n in names if "_project/" in n)
    assert packaged == locations.project_files(ROOT)
    assert {"Snakefile", "config/default.yaml", "config/profile/7b.yaml"} <= set(packaged)
    assert "theloom/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "setup", "config"))]


def test_a_project_has_all_files_and_runs_the_installed_library(made):
    assert locations.project_files(made) == locations.project_files(ROOT)
    assert not (made / "workflow/theloom").exists()
    for name in locations.project_files(ROOT):
        assert os.access(made / name, os.X_OK) == os.access(ROOT / name, os.X_OK), name


def test_a_project_runs(made, finished):
    activations, printed = finished
    assert "warning" not in printed
    assert f"theloom inspect {activations.relative_to(made)}" in printed
    assert ".venv" not in printed
    acts = theloom.open(activations)
    assert len(acts) == 600
    assert acts.attributes["code_version"] == theloom.__version__


def test_the_command_line_works_in_an_empty_folder(installed, finished):
    activations, _ = finished
    commands = [["estimate", "7b"], ["gpus"], ["inspect", str(activations)]]
    source = (
        "import theloom; from theloom.cli.main import main\n"
        f"print([main(command) for command in {commands}], theloom.__file__)"
    )
    last = installed.python(source).splitlines()[-1]
    assert last.startswith(f"[0, 0, 0] {installed.bin.parent}")
    assert not list(installed.folder.iterdir())


def test_the_command_line_knows_a_project_s_own_profiles(made, installed):
    source = (
        "from theloom.planning.forecast import settings_of; print(settings_of('own').model.source)"
    )
    profile = made / "config/profile/own.yaml"
    profile.write_text("# @package _global_\nmodel: {source: a/b}\n")
    assert installed.python(source, cwd=made) == "a/b\n"
    profile.unlink()


def test_a_project_of_another_version_is_warned_about(made, installed):
    record = made / locations.RECORD
    content = json.loads(record.read_text())
    try:
        record.write_text(json.dumps(content | {"theloom": "0.0.9"}))
        done = installed.run("python", "-m", "snakemake", "--dry-run", "--quiet", "all", cwd=made)
    finally:
        record.write_text(json.dumps(content))
    assert done.returncode == 0, done.stderr
    expected = f"warning: theloom 0.0.9 wrote this project, and {theloom.__version__} is installed"
    assert expected in done.stderr
    assert f"theloom init {made}" in done.stderr
