"""The kernels execute no more instructions than they did, a check of speed that no other load on the machine disturbs."""

import json

import pytest
from conftest import BUILD

from benchmarks import instructions

STORED = json.loads(instructions.COUNTS.read_text())


@pytest.mark.slow
def test_kernels_execute_no_more_instructions():
    try:
        if instructions.compiler(BUILD) != STORED["compiler"]:
            pytest.skip(f"the stored counts are of {STORED['compiler']}")
        counts = instructions.count(BUILD)
    except (instructions.CannotCount, FileNotFoundError) as error:
        pytest.skip(str(error))
    assert instructions.regressions(STORED["instructions"], counts) == []


def test_more_instructions_are_a_regression():
    before = STORED["instructions"]
    assert set(before) == set(instructions.KERNELS)
    assert instructions.regressions(before, before) == []
    slower = {**before, "linear_forward": round(before["linear_forward"] * 1.2)}
    (found,) = instructions.regressions(before, slower)
    assert found.startswith("linear_forward")
    assert "+20.0%" in found


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    if instructions.shutil.which("valgrind"):
        with pytest.raises(instructions.CannotCount, match="run `make build-tests`"):
            instructions.count(tmp_path)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    with pytest.raises(instructions.CannotCount, match="no valgrind"):
        instructions.count(tmp_path)
