"""Where the folder of a source is: a local path, an installed package, the hub's cache."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from theloom.errors import ModelError

DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*")


def local_folder(source: str, key: str = "model.source") -> Path | None:
    """Find the folder of a package or a path.

    Args:
        source: `package:NAME` or `package:NAME/FOLDER`, a folder, or a hub id.
        key: of the config, for messages.

    Returns:
        The folder; None for what must be a hub id.

    Raises:
        ModelError: the package or the folder is missing, or it is a file.
    """
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            raise ModelError(
                f"{key}: no installed package {package!r}; pip install it, or give a folder"
            )
        within = Path(places[0], inside)
        if ".." in Path(inside).parts or not within.is_dir():
            raise ModelError(f"{key}: the package {package} has no folder {inside!r}")
        return within
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"{key}: {source} is a file; give its folder (and model.gguf_file={folder.name})"
        )
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelError(f"{key}: no folder {source!r} (a hub id looks like 'organisation/model')")
    return None


def find_folder(
    source: str, revision: str | None, weights: Sequence[str] = (), key: str = "model.source"
) -> tuple[Path, str | None]:
    """Find the folder of a source; a hub's is fetched.

    Args:
        source: `package:NAME`, a folder, or a hub id.
        revision: a commit, tag or branch of a hub model; None: the default one.
        weights: patterns of files to fetch beside the config.
        key: of the config, for messages.

    Returns:
        The folder and, for a hub model, its commit.

    Raises:
        ModelError: the model is missing, or cannot be fetched.
    """
    local = local_folder(source, key)
    if local is not None:
        return local, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=[*DESCRIPTIONS, *weights])
        )
    except LocalEntryNotFoundError:
        where = f"{source} at {revision}" if revision else source
        raise ModelError(
            f"{key}: {where} is no local folder, nor in the local hub cache, and the hub "
            "cannot be reached; "
            "fetch it once with `hf download`, or give a folder"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{key}: {source}: {' '.join(str(error).split())}") from None
    return folder, folder.name  # a snapshot's folder is named after its commit
