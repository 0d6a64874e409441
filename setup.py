"""Copy the Snakefile, config, rules, scripts and profiles into the package when a wheel is built.

They have one home in the repository, where users edit them; an editable install uses them there.
All other settings are in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "workflow"))

from theloom.config.locations import PACKAGED, project_files  # noqa: E402


class BuildWithProject(build_py):
    """Build the package with the project's files in `theloom/_project`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file, target in self._targets().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(file, str(target), preserve_mode=True)

    def get_source_files(self) -> list[str]:
        """The files of a source distribution: a wheel must be buildable from it too."""
        return [*super().get_source_files(), *project_files(ROOT)]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = [] if self.editable_mode else [str(target) for target in self._targets().values()]
        return [*super().get_outputs(include_bytecode), *made]

    def _targets(self) -> dict[str, Path]:
        folder = Path(self.build_lib, "theloom", PACKAGED)
        return {file: folder / file for file in project_files(ROOT)}


setup(cmdclass={"build_py": BuildWithProject})
