"""The report of a sweep, by a real snakemake, in a browser without a window: no error in it, every
figure visible.
"""

import pytest
from browser import CHROMIUM, Page
from support import copy_project
from theloom.report import groups

HOOKS = "memory.activation_cache_filter=[blocks.*.hook_resid_post,blocks.1.attn.hook_pattern]"
Requested = f"{HOOKS} memory.precision_mode=fp32,bf16 corpus.max_tokens=600 extraction.shards=1"
# of every drawing in the page the size that a browser gives it
DRAWN = """Promise.all(
  Object.entries(results).filter(([path]) => path.endsWith(".svg")).map(([path, result]) =>
  new Promise(done => {
    const image = new Image();
    image.onload = () => done([path, image.naturalWidth, image.naturalHeight]);
    image.onerror = () => done([path, 0, 0]);
    image.src = result.data_uri;
  })))"""
# what sticks out of the window to the right
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_profile):
    project = copy_project(tmp_path_factory.mktemp("project"))
    tiny_profile(project)
    for report in ([], ["--report", "results/report.html"]):
        done = project.snakemake("figures", *report, profiles="tiny", overrides=Requested)
        assert done.returncode == 0, done.stdout + done.stderr
    return project.folder / "results/report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_figure_of_every_run_without_an_error(page, tmp_path, width):
    with Page(page.as_uri(), tmp_path / "profile", width) as shown:
        shown.wait_for("document.body.innerText.toLowerCase().includes('results')")
        drawn = {path: (wide, high) for path, wide, high in shown.script(DRAWN)}
        assert all(min(size) > 100 for size in drawn.values()), drawn
        assert shown.errors == []
    for group, names in groups.GROUPS.items():
        for name in names:
            assert sum(path.endswith(f"/{name}.svg") for path in drawn) == (
                1 if group == "runs" else 2
            ), name
