"""The test module: the CPU kernels themselves, on numpy arrays, without torch.

FASTNN_KERNELS names the build folder of the module; ``make test`` builds one as shipped and one with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")


def _load():
    folder = Path(__file__).parents[1] / os.environ.get("FASTNN_KERNELS", "build-tests")
    found = sorted(folder.glob("fastnn_kernels*.so"))
    if not found:
        pytest.skip(f"no test module in {folder}: run `make build-tests`", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("fastnn_kernels", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load()
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
EPS = {"float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10, "float64": 2**-52}


def bound(dtype, terms, scale):
    """One rounding of the result, and the accumulation's in float or double."""
    accumulated = (2**-52 if dtype == "float64" else 2**-23) * (terms + 8)
    subnormal = 2**-24 if dtype == "float16" else 0
    return (EPS[dtype] + accumulated) * scale + subnormal
