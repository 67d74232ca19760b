"""The choice of combinations for a quick run."""

import itertools
from types import SimpleNamespace

import conftest
import pytest
from pairwise import covering

LISTS = ["some", "values", "more"], [float("nan"), {}, [], "some"], [(), None]


class Item:
    """A test with a parametrization of two names, one of one name, and a fixture, as pytest collects it."""

    def __init__(self, first, second, third, marked):
        self.nodeid, self.originalname = f"test{first, second, third}", "test"
        self.parent = SimpleNamespace(nodeid="file")
        self.callspec = SimpleNamespace(params={"a": first, "also a": None, "b": second, "fixture": third})
        self.marked = marked

    def iter_markers(self, name):
        return [pytest.mark.parametrize(names, []).mark for names in ("a, also a", ["b"])]

    def get_closest_marker(self, name):
        return self.marked and name == "every_combination"


def pairs(rows):
    return {(i, j, row[i], row[j]) for row in rows for i, j in itertools.combinations(range(len(rows[0])), 2)}


@pytest.mark.parametrize("sizes", [(2, 3, 4), (24, 2, 4, 6), (2,) * 8, (1, 5, 1, 2, 3)], ids=str)
def test_every_pair_meets_in_few_rows(sizes):
    rows = list(itertools.product(*map(range, sizes)))
    taken = covering(rows)
    assert taken == covering(rows)
    assert taken == sorted(set(taken))
    assert pairs([rows[at] for at in taken]) == pairs(rows)
    longest, second = sorted(sizes)[:-3:-1]
    assert longest * second <= len(taken) <= 1.5 * longest * second + 8
    assert len(taken) < len(rows)


def test_what_cannot_be_left_out():
    assert covering(list(itertools.product(range(9), range(7)))) == list(range(63))
    assert covering([(0, at, 0, at % 2) for at in range(6)]) == list(range(6))
    assert covering([]) == []
    # Rows that are no product, and columns that vary together.
    rows = [(a, a, b, c) for a, b, c in itertools.product(range(3), repeat=3) if a != b]
    taken = covering(rows)
    assert pairs([rows[at] for at in taken]) == pairs(rows)
    assert len(taken) < len(rows)


@pytest.mark.parametrize(
    ("full", "marked", "left"), [(False, False, 12), (True, False, 24), (False, True, 24)]
)
def test_a_quick_run_takes_them(monkeypatch, full, marked, left):
    gone = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)))
    alone = object()
    items = [alone, *(Item(*values, marked) for values in itertools.product(*LISTS))]
    before = list(items)
    monkeypatch.setattr(conftest, "FULL", full)
    conftest.pytest_collection_modifyitems(config, items)
    assert len(items) == left + 1
    assert items == [item for item in before if item not in gone]
    assert alone in items
