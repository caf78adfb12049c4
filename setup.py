"""Installs ``shardstep``, and the folder ``core`` as ``shardstep.core``; everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HOOK = (
    'import os; os.environ.get("SHARDSTEP_MEGATRON") == "1" and '
    '__import__("shardstep.core.megatron_hook", fromlist=["install"]).install()\n'
)
"""Python runs this line when it starts, in any environment that has the wheel."""


class BuildWithPathFile(build_py):
    """Puts the path file beside the package."""

    def run(self) -> None:
        """As in the base class, then one file more."""
        super().run()
        Path(self.build_lib, "shardstep-megatron.pth").write_text(HOOK)


setup(
    packages=["shardstep", "shardstep.core", *(f"shardstep.core.{name}" for name in find_packages("core"))],
    package_dir={"shardstep": "shardstep", "shardstep.core": "core"},
    package_data={"shardstep": ["*.pyi", "py.typed"], "shardstep.core": ["*.pyi", "py.typed"]},
    cmdclass={"build_py": BuildWithPathFile},
)
