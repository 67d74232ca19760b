"""Hands the build to CMake; everything else stands in pyproject.toml."""

from scikit_build_core.setuptools.wrapper import setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    """The library is loaded by torch, not imported by CPython, so one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmake_source_dir=".", cmake_install_dir="fastnn", cmdclass={"bdist_wheel": PlatformWheel})
