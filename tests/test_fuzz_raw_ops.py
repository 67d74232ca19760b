"""Hostile arguments of every raw op under guard pages: an error of Python's, or stock's answer; never a crash or a hang.

A thousand calls of each family; with FASTNN_FULL set 100,000, with another seed each time.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz_raw_ops
import pytest
from conftest import FULL

CALLS = 100_000 if FULL else 1_000
#: Calls of one process: what its memory has come to look like is part of the trial.
BATCH = 5_000
SEED = os.environ.get("FUZZ_SEED") or (str(random.randrange(2**32)) if FULL else "0")


def run(*args, **environment):
    here = Path(__file__)
    return subprocess.run(
        [sys.executable, here.with_name("fuzz_raw_ops.py"), *map(str, args)],
        cwd=here.parents[1],
        # On a busy machine one of two threads waits for the other most of the time.
        env={
            **os.environ,
            "PYTHONPATH": str(here.parents[1]),
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
            **environment,
        },
        capture_output=True,
        text=True,
        errors="replace",
    )


@pytest.mark.parametrize("family", fuzz_raw_ops.FAMILIES)
def test_an_error_or_stocks_answer(family, tmp_path):
    state = tmp_path / "state"
    answered, compared, faults, first = 0, 0, 0, 0
    while first < CALLS:
        state.write_bytes(bytes(fuzz_raw_ops.STATE.size))
        result = run(family, SEED, first, min(BATCH, CALLS - first), FUZZ_STATE=str(state))
        number, where, *good = fuzz_raw_ops.STATE.unpack(state.read_bytes())
        answered, compared = answered + good[0], compared + good[1]
        if result.returncode not in (0, 3) and where == fuzz_raw_ops.IN_TORCH:
            first = number + 1  # torch's own fault, in the oracle
            faults += 1
            continue
        call = result.stdout.strip()
        if result.returncode < 0:
            call = run("describe", family, SEED, number).stdout.strip()
        assert result.returncode == 0, (
            f"FUZZ_SEED={SEED}, call {number} of {family}: exit status {result.returncode} (-14 is "
            f"{fuzz_raw_ops.SECONDS_PER_CALL} s of time, -27 {fuzz_raw_ops.PROCESSOR_SECONDS_PER_CALL} s of a "
            f"processor's)\n{call}\n{result.stderr[-3000:]}"
        )
        first += BATCH
    print(
        f"{family}, seed {SEED}, {CALLS} calls: {answered} answered, {compared} compared, {faults} faults of torch's"
    )
    # A trial of refusals alone would show nothing.
    assert answered > CALLS / 3
    assert compared > CALLS / 3 or family == "told"
