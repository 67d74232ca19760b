"""The test module: the CPU kernels themselves, on numpy arrays, without torch.

FASTNN_KERNELS names the build folder. ``make test`` builds two: one holds the kernels as shipped, and once more with the
instructions for BF16 and tile registers modelled; the other has those under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math

import guarded
import ml_dtypes
import numpy as np
import pytest
from conftest import BUILD, missing

from fastnn._library import ISA_LEVELS

IN_MODEL = ("avx512_bf16", "amx")


def _load(name):
    found = sorted(BUILD.glob(f"{name}.*.so"))
    if not found:
        return None
    # The module calls itself the same in either file.
    spec = importlib.util.spec_from_file_location("fastnn_kernels", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Kernels:
    """The modules' functions; those of CPU kernels get their arrays where memory ends, or begins with several threads.

    AddressSanitizer does not watch the masked loads and stores with which kernels read and write the ends of rows.
    """

    def __init__(self, shipped, modelled):
        self._module = shipped or modelled
        # By the name of a level: the module that holds it, and its name there.
        self._levels = {level: (shipped, level) for level in (shipped.levels(False) if shipped else ())}
        for level in modelled.levels(True):
            if level in IN_MODEL:
                self._levels[f"{level} modelled"] = modelled, level
            else:
                self._levels.setdefault(level, (modelled, level))

    def levels(self):
        return list(self._levels)

    def __getattr__(self, name):
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def call(level, *args, **kwargs):
            if not isinstance(level, str) or level not in (*self._levels, *ISA_LEVELS):
                return function(level, *args, **kwargs)
            module, level = self._levels[level]
            threads = args[0]
            pairs = {}

            def moved(a):
                if not isinstance(a, np.ndarray):
                    return a
                if id(a) not in pairs:
                    pairs[id(a)] = (a, guarded.array(a, at_end=threads == 1))
                return pairs[id(a)][1]

            args, kwargs = [moved(a) for a in args], {k: moved(a) for k, a in kwargs.items()}
            out = getattr(module, name)(level, *args, **kwargs)
            for theirs, ours in pairs.values():
                if theirs.flags.writeable:
                    theirs[...] = ours
            return out

        setattr(self, name, call)
        return call


def _kernels():
    modelled = _load("fastnn_kernels_modelled")
    if modelled is None:
        missing(f"no test module in {BUILD}: run `make build-tests`")
    return _Kernels(_load("fastnn_kernels"), modelled)


kernels = _kernels()
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


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# What may stand behind a product, of float64; no slope is over 1.5.
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * np.vectorize(math.erfc)(x * -math.sqrt(0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * _sigmoid(x),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}
# The slopes by the results, of those whose derivative they tell.
SLOPES = {
    "relu": lambda y: y > 0,
    "relu6": lambda y: (y > 0) & (y < 6),
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}


def behind(activation, exact, residual, dtype, most):
    """What an activation makes of sums and a residual, and how far its result may be off where the sum may be off by `most`."""
    total = exact if residual is None else exact + residual
    want = ACTIVATIONS[activation](total)
    size = np.abs(total) if residual is None else np.abs(total) + np.abs(residual)
    return want, 1.5 * most + 2 * EPS[dtype] * np.abs(want) + 4 * (
        2**-52 if dtype == "float64" else 2**-23
    ) * size
