"""For tools that look for this file: pip reads pyproject.toml, and this calls the build backend that stands there."""

import sys

USAGE = """usage: python setup.py {bdist_wheel,sdist}
Both write to dist/. To install: python -m pip install --no-build-isolation ."""


def main(arguments: list[str]) -> str:
    """Build a wheel or a source distribution, and return the name of the file.

    Raises
    ------
    SystemExit
        If it is asked for anything else.
    """
    from scikit_build_core import build

    commands = {"bdist_wheel": build.build_wheel, "sdist": build.build_sdist}
    if len(arguments) != 1 or arguments[0] not in commands:
        raise SystemExit(USAGE)
    return commands[arguments[0]]("dist")


if __name__ == "__main__":
    print(main(sys.argv[1:]))
