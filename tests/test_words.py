"""What users read has the field's words, not those that the project once made up for itself."""

import re

import pytest
from support import ROOT

OLD = (
    "foretold|foretell|reckon(s|ed|ing)?|not to be had|block by block|whole numbers?|gone on with"
    "|catalogues?|likeness|not_finite|said to be|hooks_refused|thaw(s|ed)?|let go|doubtful"
)
READ_BY_USERS = [
    *sorted((ROOT / "workflow").rglob("*.py")),
    *sorted((ROOT / "workflow").rglob("*.md")),
    *sorted((ROOT / "workflow").rglob("*.rst")),
    *sorted((ROOT / "workflow").rglob("*.smk")),
    *sorted((ROOT / "config").rglob("*.*")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "Snakefile")),
]


@pytest.mark.parametrize("file", READ_BY_USERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_has_none_of_the_words_that_were_left_behind(file):
    text = file.read_text(encoding="utf-8")
    assert [m.group(0) for m in re.finditer(rf"\b({OLD})\b", text, re.IGNORECASE)] == []
