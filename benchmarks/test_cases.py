"""The suite's cases under pytest-benchmark: ``pytest benchmarks``, with its options to save, compare and draw.

Each is checked against float64 first. Times are of single implementations, one after the other; for ratios that a busy machine
does not disturb, run ``python -m benchmarks``, which interleaves them.
"""

import pytest

from benchmarks import runner
from benchmarks.check import Reference


def test_case(benchmark, case, peer):
    if reason := peer.why_not(case):
        pytest.skip(reason)
    benchmark.group = case.id
    benchmark.extra_info.update(origin=case.workload.origin, peer=peer.title)
    reference = Reference(case)
    with peer.settings():
        call, got = runner.prepare(peer, case, reference)
        wrong = reference.disagreement(got, allowed=peer.allowed)
        assert wrong is None, f"{case.id}, {peer.title}: {wrong}"
        benchmark(call)
