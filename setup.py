"""Installs the folder ``core`` under the name ``shardstep.core``; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=["shardstep.core", *(f"shardstep.core.{name}" for name in find_packages("core"))],
    package_dir={"shardstep.core": "core"},
)
