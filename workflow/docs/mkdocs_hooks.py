"""What `make docs` does beyond mkdocs: pages that lie outside of workflow/docs, links, the keys.

README.md and config/README.md are pages of the site too. All pages are written to be read in the
repository, so their links are relative paths of the repository. Here each link is turned into the
address of the same page in the site; a file that is no page is copied to `source/`.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# pages of the site whose files lie outside of workflow/docs, by their name in the site
OUTSIDE = {
    "index.md": "README.md",
    "configuration.md": "config/README.md",
    "changes.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
DOCS = "workflow/docs"
KEYS = "<!-- the keys -->"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside of workflow/docs, and the files that pages link to."""
    from mkdocs.structure.files import File

    root = _root(config)
    for name, path in OUTSIDE.items():
        content = (root / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    sources = set()
    for page in files.documentation_pages():
        path = _repository_path(page.src_uri)
        for target in _targets(page.content_string, path):
            if _site_path(target) is None and (root / target).is_file():
                sources.add(target)
    for target in sorted(sources):
        files.append(File.generated(config, _copied(target), abs_src_path=str(root / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site, and write the table of the keys."""
    here = page.file.src_uri
    path = _repository_path(here)

    def in_site(link: re.Match[str]) -> str:
        opening, target, anchor, closing = link.groups()
        if ":" in target:
            return link[0]
        in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        address = _site_path(in_repository) or _copied(in_repository)
        relative = posixpath.relpath(address, posixpath.dirname(here) or ".")
        return f"{opening}{relative}{anchor or ''}{closing}"

    parts = re.split(f"({_FENCE.pattern})", markdown, flags=re.MULTILINE | re.DOTALL)
    text = "".join(part if part.startswith("```") else _LINK.sub(in_site, part) for part in parts)
    return text.replace(KEYS, _keys(_root(config))) if KEYS in text else text


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent


def _repository_path(site: str) -> str:
    """Where the file of a page lies in the repository."""
    return OUTSIDE.get(site) or posixpath.join(DOCS, site)


def _site_path(repository: str) -> str | None:
    """Where a file of the repository is in the site; None where it is not a part of it."""
    by_path = {path: site for site, path in OUTSIDE.items()}
    if repository in by_path:
        return by_path[repository]
    return repository.removeprefix(f"{DOCS}/") if repository.startswith(f"{DOCS}/") else None


def _copied(repository: str) -> str:
    """Where the copy of a file lies that is no page; as text, which browsers show."""
    return f"source/{repository}.txt"


def _targets(markdown: str, path: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for link in _LINK.finditer(_FENCE.sub("", markdown)):
        if ":" not in link[2]:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))


def _keys(root: Path) -> str:
    """A section for each part of the configuration, with a table of its keys."""
    sys.path.insert(0, str(root / "workflow"))
    from theloom.config import schema

    sections: dict[str, list[Any]] = {}
    for key in schema.leaf_keys():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    lines = []
    for section, keys in sections.items():
        lines += [f"## {section or 'The run'}", "", "| key | type | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for key in keys:
            default = schema_default(key)
            name = f'<span id="{key.name}"></span>`{key.name}`'
            lines.append(f"| {name} | {key.type} | `{default}` | {key.help} |")
        lines.append("")
    return "\n".join(lines)


def schema_default(key: Any) -> str:
    """A key's default as YAML spells it."""
    spelled = {"None": "null", "True": "true", "False": "false", "???": "(must be set)"}
    if key.name.startswith("model.architecture."):
        return "by profile"
    return spelled.get(str(key.default), str(key.default))
