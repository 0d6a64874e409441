"""Where the pipeline's own files are: Snakefile, config, rules, scripts, profiles.

In a checkout they are the repository's folders. A wheel carries a copy of them inside the package
(`setup.py` puts it there), so that the command line works in any folder and `theloom init` has
something to copy. Only the standard library is imported: the build reads this module too.
"""

import json
import os
from pathlib import Path

import theloom

PROJECT = (
    "Snakefile",
    "config",
    "envs/constraints.txt",
    "envs/theloom.yaml",
    "workflow/profiles",
    "workflow/report",
    "workflow/rules",
    "workflow/scripts",
)
"""The files and folders that make up a project, relative to it."""

PACKAGED = "_project"
"""The folder inside the package that holds them in a wheel."""

RECORD = ".theloom.json"
"""The file in which `theloom init` records its version and the checksum of each file it wrote."""

_PACKAGE = Path(__file__).parents[1]


def project_folder() -> Path:
    """The folder with the Snakefile, `config` and `workflow` that belong to this installation.

    Returns:
        The copy inside the package where a wheel is installed, else the checkout.

    Examples:
        >>> (project_folder() / "Snakefile").is_file()
        True
    """
    packaged = _PACKAGE / PACKAGED
    return packaged if packaged.is_dir() else _PACKAGE.parents[1]


def snakefile() -> str:
    """Find the installation's Snakefile, for the `module` statement of another workflow.

    Returns:
        Its path.

    Examples:
        >>> Path(snakefile()).name
        'Snakefile'
    """
    return str(project_folder() / "Snakefile")


def checkout() -> Path | None:
    """Find the checkout that this code runs from.

    Returns:
        Its folder; None where the code is installed from a wheel.
    """
    folder = project_folder()
    return folder if folder != _PACKAGE / PACKAGED and (folder / "Snakefile").is_file() else None


def config_folder() -> Path:
    """The folder with `default.yaml` and the profiles that the command line uses.

    Returns:
        The one of the current folder where that is a project of `theloom init`, since its profiles
        may have been edited; else the installation's own.
    """
    current = Path.cwd()
    return (current if (current / RECORD).is_file() else project_folder()) / "config"


def home_of(snakefile_folder: str | os.PathLike[str]) -> Path:
    """The project that a Snakefile belongs to.

    Args:
        snakefile_folder: The folder of that Snakefile. Snakemake may have fetched it from a
            repository, in which case nothing else of the project is there.

    Returns:
        That folder where it has a config, else the installation's own project.
    """
    folder = Path(snakefile_folder)
    return folder if (folder / "config/default.yaml").is_file() else project_folder()


def jobs_path(home: Path, cache: Path) -> Path:
    """A folder from which jobs in an environment of their own can import theloom, and no more.

    Args:
        home: The project that is running.
        cache: Where to make the folder if the project holds no copy of the library.

    Returns:
        The project's `workflow` folder in a checkout; else `cache`, with a link to the package in
        it. The package's parent would not do: it is a `site-packages`, whose other packages were
        built for another environment.
    """
    if (home / "workflow/theloom").is_dir():
        return home / "workflow"
    link = cache.absolute() / "theloom"
    if not (link.is_symlink() and link.resolve() == _PACKAGE.resolve()):
        cache.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f"theloom.{os.getpid()}")
        fresh.symlink_to(_PACKAGE, target_is_directory=True)
        fresh.replace(link)  # in one step: other processes may do the same at this moment
    return link.parent


def program(name: str) -> str:
    """Tell how a user types a program of the environment.

    Args:
        name: Of the program.

    Returns:
        `.venv/bin/NAME` in a checkout, else NAME.
    """
    return f".venv/bin/{name}" if checkout() else name


def version_warning(project: Path) -> str | None:
    """A line for a project that another version of theloom wrote than the one installed.

    Args:
        project: The folder of the project.

    Returns:
        The warning, or None where the versions agree or `theloom init` did not write the project.
    """
    try:
        version = json.loads((project / RECORD).read_text(encoding="utf-8"))["theloom"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if version == theloom.__version__:
        return None
    return (
        f"warning: theloom {version} wrote this project, and {theloom.__version__} is installed; "
        f"update the project's files: theloom init {project}"
    )


def project_files(folder: Path) -> list[str]:
    """List the files of a project.

    Args:
        folder: A checkout, or the copy inside the package.

    Returns:
        Sorted paths relative to the folder, with `/`; without caches.
    """
    files: list[Path] = []
    for name in PROJECT:
        path = folder / name
        files += [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sorted(f.relative_to(folder).as_posix() for f in files if not _is_residue(f))


def _is_residue(file: Path) -> bool:
    """Whether a program left the file behind: byte code, or an editor's hidden file."""
    return file.suffix == ".pyc" or file.name.startswith(".")
