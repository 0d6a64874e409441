"""The front page of a run, `report.html`: its figures with captions, what ran, and where it lies.

The page needs no other file and no network to be read; its links lead to the files beside it.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theloom import terminal
from theloom.config.schema import Config
from theloom.dataset import inspect
from theloom.dataset.activations import Activations, open_activations
from theloom.errors import ConfigError
from theloom.report import answers, groups
from theloom.report.speed import ShardWork, overall, shard_work
from theloom.verification import encoding, recorded

_ORDER = (
    "probe",
    "answers",
    "states",
    "attention",
    "memory",
    "speed",
)  # groups of figures on the page
_FILES = {
    "activations.h5": "the rows; theloom.open reads them",
    "verification.h5": "the errors of the recomputed documents",
    "estimate.h5": "predicted memory, disk and time",
    "model.h5": "hook points of the model, and measured memory",
    "tokens.h5": "token ids, windows and shards",
    "answers.h5": "prompts with their answers, and how these were sampled",
    "config": "the config of each stage",
    "logs": "the log of each job",
    "provenance.html": "Snakemake's own report, by `theloom report`: code, jobs and their times",
}


@dataclass(frozen=True)
class Fact:
    """A line of the table: what it is, its value in words, and whether it is a failure."""

    name: str
    value: str
    failed: bool = False


def write_page(config: Config, folder: Path, captions: Path) -> None:
    """Write `report.html` of a run whose figures are drawn.

    Args:
        config: the run's config.
        folder: the run's folder.
        captions: folder of the captions, `<figure>.rst`.

    Raises:
        ConfigError: jinja2 or docutils is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError("report.html needs jinja2; pip install 'theloom[report]'") from None
    acts = open_activations(folder / "activations.h5")
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("page.html.j2").render(
        name=folder.name,
        title=config.report.title or folder.name,
        lead=_lead(acts),
        figures=_figures(folder / "figures", captions),
        facts=_facts(acts, folder),
        files=[
            (name, meaning, (folder / name).exists())
            for name, meaning in _FILES.items()
            if _is_there(folder, name)
        ],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _is_there(folder: Path, name: str) -> bool:
    """`theloom report` makes Snakemake's own report after the page, which that shows too."""
    return name == "provenance.html" or (folder / name).exists()


def _figures(folder: Path, captions: Path) -> list[dict[str, str]]:
    """Of each figure that is drawn its name, title, caption in HTML, and drawing in base64."""
    named = [item for group in _ORDER for item in groups.GROUPS[group].items()]
    return [
        {
            "name": name,
            "title": title,
            "caption": _html((captions / f"{name}.rst").read_text(encoding="utf-8")),
            "drawing": base64.b64encode((folder / f"{name}.svg").read_bytes()).decode(),
        }
        for name, title in named
        if (folder / f"{name}.svg").is_file()
    ]


def _html(caption: str) -> str:
    try:
        from docutils.core import publish_parts
    except ImportError:
        raise ConfigError("report.html needs docutils; pip install 'theloom[report]'") from None
    settings = {"raw_enabled": False, "file_insertion_enabled": False}
    return str(publish_parts(caption, writer="html5", settings_overrides=settings)["body"])


def _lead(acts: Activations) -> str:
    hooks = "1 hook point" if len(acts.hooks) == 1 else f"{len(acts.hooks)} hook points"
    return (
        f"Hidden states of {acts.attributes['model_source']}: {len(acts):,} rows of {hooks}, "
        f"from {acts.document_count:,} documents."
    )


def _facts(acts: Activations, folder: Path) -> list[Fact]:
    schema, attributes = inspect.file_schema(acts), acts.attributes
    works = [shard_work(shard) for shard in sorted((folder / "shards").glob("*.h5"))]
    return [
        Fact("model", _with_revision(attributes)),
        Fact("precision", _precision(attributes, acts.stored_as)),
        Fact("corpus", f"{attributes['corpus']}, {acts.document_count:,} documents"),
        *_answers(folder / "answers.h5"),
        Fact("windows", f"{schema['windows']:,}, the longest of {schema['longest_window']:,}"),
        Fact("rows", f"{len(acts):,} of {len(acts.hooks)} hook points"),
        Fact("hook points", _listed(acts.hooks)),
        Fact("on disk", terminal.format_bytes(schema["bytes_on_disk"])),
        *_time(works),
        *_memory(acts),
        Fact("device", str(attributes["device"])),
        _verification(folder / "verification.h5", acts.stored_as),
        Fact("versions", _versions(attributes)),
    ]


def _listed(hooks: Sequence[str]) -> str:
    shown = list(hooks) if len(hooks) <= 6 else [*hooks[:3], "…", *hooks[-2:]]
    return ", ".join(shown)


def _with_revision(attributes: Any) -> str:
    source, revision = attributes["model_source"], attributes.get("model_revision", "")
    return f"{source}, revision {revision}" if revision not in ("", "null") else str(source)


def _precision(attributes: Any, stored: str) -> str:
    bits = attributes["model_quantization"]
    weights = attributes["model_precision"] if bits in ("null", None) else f"{bits} weights"
    return f"{weights}, rows stored as {stored}"


def _time(works: Sequence[ShardWork]) -> list[Fact]:
    seconds, rate = overall(works)
    if rate is None:
        return []
    shards = "1 shard" if len(works) == 1 else f"{len(works)} shards"
    return [Fact("time", f"{seconds:,.0f} s in {shards}, {rate:,.0f} tokens/s")]


def _answers(path: Path) -> list[Fact]:
    """How many answers there are, why they end, and how fast they were sampled."""
    if not path.exists():
        return []
    found = answers.read(path)
    shortest, middle, longest = found.range
    words = f"{len(found.lengths):,} to {found.prompts:,} prompts, of {shortest:,} to {longest:,} "
    words += f"tokens ({middle:,.0f} in the median); end: "
    words += ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.items())
    facts = [Fact("answers", words)]
    if found.tokens_per_second is not None:
        rate = f"{found.tokens_sampled:,} tokens, {found.tokens_per_second:,.1f} a second"
        facts.append(Fact("sampling", f"{rate}; {found.settings}"))
    return facts


def _memory(acts: Activations) -> list[Fact]:
    predicted, peak = (int(acts.metrics[n]) for n in ("predicted_memory", "peak_memory"))
    if not peak:
        return []
    words = map(terminal.format_bytes, (peak, predicted))
    return [Fact("memory", "{} at the peak, {} predicted".format(*words))]


def _verification(path: Path, stored_as: str) -> Fact:
    """What `verify` found: it fails before it writes a file of rows that are wrong."""
    found = recorded.read(path)
    words = f"{found.windows - found.damaged:,} of {found.windows:,} windows have their hashes"
    if found.documents:
        words += f"; {found.documents} documents recomputed"
        words += f", largest error {found.errors.max():.1e} of the largest value"
    if found.cost is not None:
        words += f" beyond the rounding of {encoding.words(stored_as, found.cost)}"
    return Fact("verification", words, failed=found.damaged > 0)


def _versions(attributes: Any) -> str:
    versions = json.loads(attributes["package_versions"])
    shown = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return ", ".join([*shown, f"TheLoom {attributes['code_version']}"])
