"""The attributes of a file of hidden states, which may be damaged or a stranger's."""

import json
from pathlib import Path
from typing import Any

from theloom.store import file_format

# what other code takes for a number, and for JSON of a list or an object
_NUMBERS = ("shard", "first_row", "streamed_windows", "context_length", "empty_documents")
_LISTS = ("hooks", "shard_rows", "model_switches", "model_precision_steps")
_OBJECTS = ("config", "package_versions")


class Attributes(dict[str, Any]):
    """Attributes by name; one that is missing, or has another form than TheLoom writes, is a
    StoreError.

    Args:
        path: the file.
        values: its attributes.

    Raises:
        StoreError: a value has another form.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.path = path
        for name in (n for n in _NUMBERS if n in values):
            if not isinstance(values[name], int):
                raise self._wrong(name)
        for names, form in ((_LISTS, list), (_OBJECTS, dict)):
            for name in (n for n in names if n in values):
                self.parsed(name, form)

    def __missing__(self, name: str) -> Any:
        raise file_format.damaged(self.path, ValueError(f"it lacks the attribute {name}"))

    def __reduce__(self) -> tuple[type["Attributes"], tuple[Path, dict[str, Any]]]:
        return Attributes, (self.path, dict(self))

    def parsed(self, name: str, form: type) -> Any:
        """A value that is stored as JSON.

        Args:
            name: of the attribute.
            form: the type of what it holds: `list` or `dict`.

        Raises:
            StoreError: the attribute is missing, or holds something else.
        """
        value = self[name]
        try:
            found = json.loads(value)
        except (ValueError, TypeError, RecursionError):
            found = None
        if not isinstance(found, form):
            raise self._wrong(name)
        return found

    def _wrong(self, name: str) -> Exception:
        return file_format.damaged(
            self.path, ValueError(f"its attribute {name} has another form than TheLoom writes")
        )
