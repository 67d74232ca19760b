"""The test module: the CPU kernels themselves, on numpy arrays, without torch.

FASTNN_KERNELS names the build folder of the module; ``make test`` builds one as shipped and one with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

import guarded
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


class _Kernels:
    """The module's functions; those of CPU kernels get their arrays where memory ends, or begins with several threads.

    AddressSanitizer does not watch the masked loads and stores with which kernels read and write the ends of rows.
    """

    def __init__(self, module):
        self._module = module
        self._levels = set(module.levels())

    def __getattr__(self, name):
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def call(*args, **kwargs):
            if not args or not isinstance(args[0], str) or args[0] not in self._levels:
                return function(*args, **kwargs)
            threads = args[1]
            pairs = {}

            def moved(a):
                if not isinstance(a, np.ndarray):
                    return a
                if id(a) not in pairs:
                    pairs[id(a)] = (a, guarded.array(a, at_end=threads == 1))
                return pairs[id(a)][1]

            args, kwargs = [moved(a) for a in args], {k: moved(a) for k, a in kwargs.items()}
            out = function(*args, **kwargs)
            for theirs, ours in pairs.values():
                if theirs.flags.writeable:
                    theirs[...] = ours
            return out

        setattr(self, name, call)
        return call


kernels = _Kernels(_load())
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
EPS = {"float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10, "float64": 2**-52}


@contextlib.contextmanager
def refused(*outputs):
    """A call that an algorithm does not cover: refused, and nothing written to its outputs, which begin as 17."""
    for a in outputs:
        a.fill(17)
    with pytest.raises(RuntimeError, match=r"^it"):
        yield
    for a in outputs:
        assert np.all(a.astype(np.float64) == 17)


def bound(dtype, terms, scale):
    """One rounding of the result, and the accumulation's in float or double."""
    accumulated = (2**-52 if dtype == "float64" else 2**-23) * (terms + 8)
    subnormal = 2**-24 if dtype == "float16" else 0
    return (EPS[dtype] + accumulated) * scale + subnormal
