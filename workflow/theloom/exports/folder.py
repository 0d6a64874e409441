"""The folder of an export: what it is of, and whether it is finished; files that appear whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theloom.errors import ConfigError
from theloom.store import file_format

RECORD = "theloom-export.json"
_UNFINISHED = ".partial"


def begin(folder: Path, identity: dict[str, Any]) -> bool:
    """Prepare the folder of an export.

    Args:
        folder: it is made where there is none.
        identity: what the export is of; another one may not go on with its files.

    Returns:
        Whether it is finished already.

    Raises:
        ConfigError: the folder holds something else.
    """
    record = folder / RECORD
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            before, finished = found["export"], bool(found["finished"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{record} is damaged; remove {folder}, and export again") from None
        if before != identity:
            differ = [k for k in identity if before.get(k) != identity[k]]
            raise ConfigError(
                f"{folder} holds another export, which differs in {', '.join(differ)}; give "
                "another folder"
            )
        return finished
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; give a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, identity, [], finished=False)
    return False


def write_record(
    folder: Path, identity: dict[str, Any], left_out: list[str], finished: bool
) -> None:
    """Write what an export is of, what it left out, and whether it is finished.

    Args:
        folder: of the export.
        identity: what tells one export from another, plain values.
        left_out: sentences on what the export could not carry.
        finished: whether all files are written.
    """
    written = {"export": identity, "left_out": left_out, "finished": finished}
    with whole(folder / RECORD) as path:
        text = json.dumps(written, indent=2, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Have a file written under another name, until it is whole and on the disk.

    Args:
        path: of the file; its folder is there.

    Yields:
        The path to write to.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    yield unfinished
    file_format.sync(unfinished)
    unfinished.replace(path)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Args:
        folder: of the export.

    Returns:
        `export`, `left_out` and `finished`.
    """
    found: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return found
