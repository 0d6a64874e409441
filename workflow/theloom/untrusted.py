"""What a file from somebody else must not do: make a reader look into other files than it seems to be made of.

HDF5 follows external links, external storage and virtual sources wherever they point, without a word. Here each of them
must be a file in the dataset's own folder, or one that the caller allows by name.
"""

import os
from collections.abc import Collection
from pathlib import Path

import h5py

from theloom.errors import StoreError


def check(file: h5py.File, path: Path, allow: Collection[str] = ()) -> None:
    """Look at every link and every dataset of an open file. Raises StoreError."""

    links: list[tuple[str, object]] = []
    items: list[tuple[str, object]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))  # h5py cannot raise from within a visit
    for name, link in links:
        if isinstance(link, h5py.ExternalLink):
            check_name(path, link.filename, allow, f"its {name} is a link to")
        if isinstance(link, h5py.SoftLink):
            raise StoreError(f"{path}: its {name} is a soft link, which no file of TheLoom has; do not use this file")
    file.visititems(lambda name, item: items.append((name, item)))
    for name, item in items:
        if not isinstance(item, h5py.Dataset):
            continue
        properties = item.id.get_create_plist()
        for number in range(properties.get_external_count()):
            stored = properties.get_external(number)[0].decode(errors="replace")
            check_name(path, stored, allow, f"its {name} is stored in")
        if properties.get_layout() == h5py.h5d.VIRTUAL:
            for number in range(properties.get_virtual_count()):
                source = properties.get_virtual_filename(number)
                check_name(path, source, allow, f"its {name} refers to")


def check_name(path: Path, source: str, allow: Collection[str], what: str) -> None:
    """That a name in a file leads to a file in its folder, or is allowed. Raises StoreError."""
    if source in allow:
        return
    if Path(source).is_absolute() or os.path.normpath(source).startswith(".."):
        raise StoreError(
            f"{path}: {what} {source}, which is outside of its folder; if you trust it: "
            f"theloom.open(..., allow=[{source!r}])"
        )
