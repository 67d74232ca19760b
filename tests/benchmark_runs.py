"""What the tests of the benchmark suite share: small cases, and a run of them."""

import json
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import (
    cases,
    limits,
    peers,
)
from benchmarks.cases import Input, Workload

RESULTS = Path(cases.__file__).parent / "results"
LINEAR = Workload(
    "linear", "linear_relu", "a test", (Input((4, 8)), Input((3, 8), "weight"), Input((3,), "bias"))
)
CONV = Workload(
    "conv",
    "conv2d_relu_max_pool2d",
    "a test",
    (Input((2, 3, 9, 9), grad=False), Input((4, 3, 3, 3), "weight"), Input((4,), "bias")),
    {"stride": 1, "padding": 1, "kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
)
ATTENTION = Workload(
    "attention",
    "scaled_dot_product_attention",
    "a test",
    (Input((2, 2, 8, 16)),) * 3 + (Input((2, 1, 1, 8), "padding"),),
)
SMALL = cases.all_cases((LINEAR, CONV, ATTENTION))


LIMITS = limits.Limits(
    2,
    {"fp32": (2e11, "FMA"), "int8": (8e11, "dot product")},
    (limits.Level("L1", 1 << 16, 4e11, 3e11), limits.Level("memory", 1 << 62, 2e10, 1e10)),
)
FAST = [peers.FastNN(), peers.Eager(), peers.EagerChannelsLast()]


def arguments(**given):
    defaults = {
        "quick": False,
        "full": False,
        "family": [],
        "filter": [],
        "dtype": [],
        "direction": [],
        "peer": [],
        "module": None,
        "input": [],
        "out": None,
        "threads": None,
        "device": "cpu",
        "prefer_kernels": False,
        "goals": False,
        "minutes": None,
    }
    return Namespace(**{**defaults, **given})


def run(out, chosen=SMALL, nets=(), contenders=None, **given):
    console = Console(width=200, record=True)
    status = cli.run(arguments(out=out, **given), list(chosen), list(nets), console, contenders or FAST)
    found = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else None
    return status, found, console.export_text()
