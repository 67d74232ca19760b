"""Reads results back: checks a file against the schema and says what is wrong with one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

SCHEMA_NAME, VERSION = "fastnn-benchmark", 2
SCHEMA_FILE = Path(__file__).with_name("schema.json")


class UnreadableResult(ValueError):
    """A result that cannot be used; the message says why and what to do."""


def validate(record: dict) -> None:
    """Raise `jsonschema.ValidationError` if a record does not fit ``schema.json``."""
    # Not needed to measure, and not on every machine with a GPU.
    import jsonschema

    jsonschema.validate(record, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def load(path: Path | str) -> dict:
    """The record in a file, in the ``results.json`` of a folder, or in a ``gpu.json``."""
    import jsonschema

    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableResult(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UnreadableResult(f"{path} is not JSON: {error}") from error
    if isinstance(record, dict) and record.get("schema") == "fastnn-gpu":
        record = record.get("suite")
        if record is None:
            raise UnreadableResult(f"{path}: its suite left no result, see the output of its steps")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA_NAME:
        raise UnreadableResult(
            f'{path} is not a result of this suite: expected an object with "schema": "{SCHEMA_NAME}"'
        )
    version = record.get("version")
    if version != VERSION:
        if not isinstance(version, int):
            age = "names no version"
        else:
            age = f"has the {'older' if version < VERSION else 'newer'} schema version {version}"
        raise UnreadableResult(
            f"{path} {age}, this suite reads version {VERSION}: measure again, or read it with the suite that wrote it"
        )
    try:
        validate(record)
    except jsonschema.ValidationError as error:
        place = "/".join(map(str, error.absolute_path)) or "the whole"
        raise UnreadableResult(f"{path} does not fit the schema at {place}: {error.message[:200]}") from error
    return record
