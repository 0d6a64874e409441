"""The documentation site has every page, builds without a warning and fetches nothing."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from support import ROOT
from theloom.config import schema

DOCS = ROOT / "workflow/docs"
FETCHED = re.compile(
    r"""<(?:script|link|img|iframe|source|object|embed)\b[^>]*?(?:src|href|data)=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import[^;]*//"""
)


class _Loader(yaml.SafeLoader):
    """YAML whose Python objects (the slugs of anchors) are read as nothing."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", DOCS / "mkdocs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: list) -> list[str]:
    """The pages of a navigation, in their order."""
    pages = []
    for entry in nav:
        for target in entry.values():
            pages += [target] if isinstance(target, str) else pages_of(target)
    return pages


@pytest.fixture(scope="module")
def settings() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_Loader)


def test_every_page_is_in_the_navigation_once_and_exists(settings):
    outside = hooks().OUTSIDE
    in_docs = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(pages_of(settings["nav"])) == sorted(in_docs | set(outside))
    assert all((ROOT / path).is_file() for path in outside.values())


def test_a_broken_link_or_anchor_stops_the_build(settings):
    assert settings["strict"] is True
    assert settings["validation"]["links"]["anchors"] == "warn"
    assert settings["validation"]["links"]["not_found"] == "warn"


def test_the_site_is_not_in_git(settings):
    assert f"{settings['site_dir']}/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        timeout=1800,
    )
    assert build.returncode == 0, build.stderr
    return folder


def test_the_site_fetches_nothing_from_another_host(site):
    files = [f for f in site.rglob("*") if f.suffix in (".html", ".css")]
    assert len(files) > 20
    for file in files:
        match = FETCHED.search(file.read_text(encoding="utf-8"))
        assert match is None, f"{file.relative_to(site)}: {match[0]}"


@pytest.mark.parametrize("page", ["index", "configuration", "api/extraction", "examples/index"])
def test_relative_links_of_the_site_lead_to_files(site, page):
    file = site / f"{page}.html"
    links = re.findall(r'(?:href|src)="([^"#?]+)', file.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert len(local) > 20
    for link in local:
        assert (file.parent / link).exists(), link


def test_the_reference_has_every_public_function_and_key(site):
    extraction = (site / "api/extraction.html").read_text(encoding="utf-8")
    import theloom.extraction

    for name in theloom.extraction.__all__:
        assert f'id="theloom.extraction.{name}"' in extraction, name
    keys = (site / "api/keys.html").read_text(encoding="utf-8")
    for key in schema.leaf_keys():
        assert f'id="{key.name}"' in keys, key.name
    assert "theloom.gpu.GPUManager.can_allocate" in (site / "api/gpu.html").read_text()
