"""The attributes of a file of hidden states, which may be damaged or a stranger's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from theloom.model.length_switches import LengthSwitch
from theloom.store import file_format

# what other code takes for a number, and for JSON of a list or an object
_NUMBERS = ("shard", "first_row", "tokens", "streamed_windows", "context_length", "empty_documents")
_LISTS = ("hooks", "columns", "model_switches", "model_precision_steps")
_TEXTS = ("rows_keep", "rows_pool", "rows_by")
_OBJECTS = ("config", "package_versions")
_BY_SHARD = ("batch_tokens", "chunk_size", "shard_rows", "shard_tokens")


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
            if type(values[name]) is not int or values[name] < 0:
                raise self._wrong(name)
        texts = (v for n in _TEXTS if n in values for v in [values[n]] if not isinstance(v, str))
        if any(True for _ in texts):
            raise self._wrong(" or ".join(_TEXTS))
        for names, form in ((_LISTS, list), (_OBJECTS, dict)):
            for name in (n for n in names if n in values):
                self.parsed(name, form)

        if len({len(self.by_shard(name)) for name in _BY_SHARD if name in values}) > 1:
            raise self._wrong(" and ".join(_BY_SHARD))
        if "model_switches" in values:
            fields = {field.name for field in dataclasses.fields(LengthSwitch)}
            switches = self.parsed("model_switches", list)
            if not all(
                isinstance(s, dict) and set(s) == fields and type(s["beyond"]) is int
                for s in switches
            ):
                raise self._wrong("model_switches")

    def __missing__(self, name: str) -> Any:
        raise file_format.damaged_error(self.path, ValueError(f"it lacks the attribute {name}"))

    def __reduce__(self) -> tuple[type["Attributes"], tuple[Path, dict[str, Any]]]:
        return Attributes, (self.path, dict(self))

    def parsed(self, name: str, form: type) -> Any:
        """Parse a value that is stored as JSON.

        Args:
            name: of the attribute.
            form: the type of what it holds: `list` or `dict`.

        Returns:
            The list or dict.

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

    def by_shard(self, name: str) -> list[int]:
        """A number of each shard; a merged file holds a JSON list, a shard one number.

        Args:
            name: of the attribute.

        Returns:
            At least one integer; `batch_tokens` and `chunk_size` are positive, others not negative.

        Raises:
            StoreError: the attribute is missing, or holds something else.
        """
        value = self[name]
        found = [value] if isinstance(value, int) else self.parsed(name, list)
        least = 1 if name in ("batch_tokens", "chunk_size") else 0
        if not found or not all(type(number) is int and number >= least for number in found):
            raise self._wrong(name)
        return found

    def _wrong(self, name: str) -> Exception:
        return file_format.damaged_error(
            self.path, ValueError(f"its attribute {name} has another form than TheLoom writes")
        )
