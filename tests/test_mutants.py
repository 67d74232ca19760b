"""The list of mutants fits the sources; ``make mutants`` shows that tests notice each."""

from __future__ import annotations

import shlex

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1))
def test_a_mutant_stands_in_one_place(number):
    mutant = MUTANTS[number - 1]
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.text) == 1
    assert mutant.becomes != mutant.text
    files = [word for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_there_are_many_of_each_kind():
    assert sum(mutant.file.endswith(".py") for mutant in MUTANTS) >= 15
    assert sum(mutant.file.startswith("csrc/") for mutant in MUTANTS) >= 10
