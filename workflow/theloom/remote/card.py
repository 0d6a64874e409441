"""The data card of a pushed folder: what its rows are of, how to read them, licences."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from theloom.credentials import hidden
from theloom.errors import printable
from theloom.remote.manifest import MANIFEST, Manifest
from theloom.store.index import FileIndex
from theloom.terminal import format_bytes

_SHOWN = 40  # hook points that are listed


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes.

    Args:
        data: the bytes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(data).hexdigest()


def data_card(
    listed: FileIndex, url: str, main: str, manifest: Manifest, licences: Sequence[str]
) -> str:
    """Write the card, with the header that the Hugging Face hub reads.

    Args:
        listed: the index of the file that is opened.
        url: of the folder.
        main: name of that file.
        manifest: of the folder.
        licences: lines on licences; where there are none, the card says that nobody stated them.

    Returns:
        Markdown.
    """
    of = listed.attributes
    hooks = json.loads(of["hooks"])
    shapes = {hook: listed.datasets[f"hooks/{hook}/activations"].shape[1:] for hook in hooks}
    total = sum(entry.size for entry in manifest.files.values())
    facts = {
        "model": _named(of, "model_source", "model_revision"),
        "model's fingerprint": of.get("model_fingerprint", ""),
        "adapters": _adapters(of),
        "tokenizer": _named(of, "tokenizer", "tokenizer_revision"),
        "corpus": _named(of, "corpus"),
        "corpus's hash": of.get("corpus_hash", ""),
        "documents": f"{listed.datasets['documents/id'].shape[0]:,}",
        "rows": f"{of['rows']:,}",
        "rows that are kept": _named(of, "rows_keep"),
        "rows are pooled by": _named(of, "rows_pool"),
        "precision of the rows": _named(of, "precision"),
        "precision of the model": _named(of, "model_precision"),
        "quantization": _named(of, "model_quantization"),
        "bytes": f"{total:,} ({format_bytes(total)}) in {len(manifest.files)} files",
        "run_fingerprint": of.get("run_fingerprint", ""),
    }
    table = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value]
    points = [f"- `{printable(h)}`: {_shape(shapes[h])} for each row" for h in hooks[:_SHOWN]]
    if len(hooks) > _SHOWN:
        points.append(f"- and {len(hooks) - _SHOWN} more")
    stated = [f"- {_cell(line)}" for line in licences] or [
        "- Not stated by who pushed this. Hidden states are made from the model and the corpus, "
        "whose licences may restrict their use."
    ]
    return "\n".join(
        [
            "---",
            f"pretty_name: {json.dumps('Hidden states of ' + _cell(facts['model']))}",
            "license: other",
            "tags: [theloom, hidden-states, activations, interpretability]",
            "---",
            "",
            f"# Hidden states of {_cell(facts['model'])}",
            "",
            "| | |",
            "|---|---|",
            *table,
            "",
            "## Hook points",
            "",
            *points,
            "",
            "## How to load",
            "",
            "```python",
            "import theloom",
            "",
            f"acts = theloom.open({json.dumps(hidden(url))})  # rows are read by ranges",
            f"rows = acts[{json.dumps(hooks[0] if hooks else '')}][:100]",
            "```",
            "",
            f"`{main}` is HDF5, which any program for HDF5 reads once the files are downloaded. "
            f"`{MANIFEST}` has the SHA-256 of each file, and `hashes/` those of its blocks; "
            "`theloom.open` checks each block that it reads.",
            "",
            "## Licences",
            "",
            *stated,
            "",
        ]
    )


def _named(attributes: dict[str, Any], *names: str) -> str:
    """A source and its revision; of a folder of this machine the last name alone."""
    found = [str(attributes[name]) for name in names if attributes.get(name) not in (None, "")]
    found = [PurePath(text).name if PurePath(text).is_absolute() else text for text in found]
    return " at ".join(text for text in found if text not in ("none", "None"))


def _adapters(attributes: dict[str, Any]) -> str:
    adapters = json.loads(attributes.get("model_adapters") or "[]")
    return ", ".join(_named(adapter, "source", "revision") for adapter in adapters)


def _cell(text: object) -> str:
    return printable(hidden(str(text))).replace("|", "\\|")


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "a number"
