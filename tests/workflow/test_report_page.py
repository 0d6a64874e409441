"""`theloom report` of a sweep, in a browser without a window: no error in any page, every figure
visible, nothing wider than the window.
"""

import subprocess
import sys

import preloading
import pytest
from browser import CHROMIUM, Page
from support import copy_project
from theloom.report import groups

HOOKS = "memory.activation_cache_filter=[blocks.*.hook_resid_post,blocks.1.attn.hook_pattern]"
NAMES = {name for group in groups.groups([]) for name in groups.GROUPS[group]}
REQUESTED = f"{HOOKS} memory.precision_mode=fp32,bf16 corpus.max_tokens=600 extraction.shards=1"
# of every drawing in the page the size that a browser gives it
DRAWN = """Promise.all(
  Object.entries(results).filter(([path]) => path.endsWith(".svg")).map(([path, result]) =>
  new Promise(done => {
    const image = new Image();
    image.onload = () => done([path, image.naturalWidth, image.naturalHeight]);
    image.onerror = () => done([path, 0, 0]);
    image.src = result.data_uri;
  })))"""
SHOWN = """Array.from(document.querySelectorAll("figure")).map(figure =>
  [figure.id, figure.querySelector("img").naturalWidth, figure.querySelector("img").width])"""
# what sticks out of the window to the right
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_profile):
    project = copy_project(tmp_path_factory.mktemp("project"))
    tiny_profile(project)
    command = [sys.executable, "-m", "theloom.cli", "report", "tiny", "--set", REQUESTED]
    done = subprocess.run(
        command,
        cwd=project.folder,
        env=preloading.environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    named = done.stdout.split("open in a browser:")[1].split()
    assert len(named) == 2
    return [project.folder / page for page in named]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_front_page_whole(pages, tmp_path, width):
    expected = NAMES
    for number, page in enumerate(pages):
        with Page(page.as_uri(), tmp_path / f"profile{number}", width) as shown:
            drawn = {name: sizes for name, *sizes in shown.script(SHOWN)}
            assert drawn.keys() == expected
            assert all(own > 100 for own, _ in drawn.values()), drawn
            assert all(0.7 * width < wide or wide > 900 for _, wide in drawn.values()), drawn
            assert shown.script(TOO_WIDE) == 0
            assert shown.errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_snakemake_s_own_report_shows_every_figure_of_every_run(pages, tmp_path):
    provenance = pages[0].with_name("provenance.html")
    with Page(provenance.as_uri(), tmp_path / "profile", 1280) as shown:
        shown.wait_for("document.body.innerText.toLowerCase().includes('results')")
        drawn = {path: (wide, high) for path, wide, high in shown.script(DRAWN)}
        assert all(min(size) > 100 for size in drawn.values()), drawn
        assert shown.errors == []
    run = pages[0].parent.name
    for name in NAMES:
        assert f"results/{run}/figures/{name}.svg" in drawn
