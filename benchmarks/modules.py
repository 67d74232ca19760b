"""A user's own module: stock against converted, as a whole and layer by layer.

``my_model.py:build`` names a function without arguments that returns a :class:`torch.nn.Module` in float32. It is measured in
eval mode: without dropout, and with fixed statistics, so that stock and converted must agree.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, USUAL, Case, Input, Workload

FAMILY = "module"


class UnusableModule(ValueError):
    """A module that cannot be measured; the message says why and what is expected."""


@dataclass(frozen=True, eq=False)
class ModuleCase(Case):
    """A module on given inputs. `modules` are stock's and fastnn's, with equal parameters."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    given: tuple[torch.Tensor, ...] = ()
    whole: bool = False
    # What cases() was asked for, and which of its cases this is: another process makes it anew from that.
    source: tuple[str, tuple[str, ...], tuple[str, ...], int] | None = None

    elementwise = False

    def __reduce__(self):
        return _case_again, self.source

    @property
    def id(self) -> str:
        # Layers of one form differ by their names.
        return f"{super().id}/{self.workload.origin}"

    @property
    def module(self) -> torch.nn.Module:
        return self.modules["stock"]

    @property
    def has_layouts(self) -> bool:
        return False

    @property
    def data_count(self) -> int:
        return len(self.given)

    def call(self, who, *, double=False, layout=None):
        return call_of(self, self.modules[who], self.given, double)

    def least(self):
        return None


def call_of(case: Case, module: torch.nn.Module, given: tuple[torch.Tensor, ...], double: bool):
    """A module as :meth:`Case.call` gives a function: with its inputs, and, for the backward pass, its parameters."""
    if double:
        module = copy.deepcopy(module).double()
    inputs = [
        t.detach().to(torch.float64) if double and t.is_floating_point() else t.detach().clone()
        for t in given
    ]
    for t, spec in zip(inputs, case.workload.inputs, strict=True):
        t.requires_grad_(case.backward and spec.grad)
    # The parameters are the module's own: they stand among the tensors so that their gradients are taken and checked.
    parameters = [p for p in module.parameters() if p.requires_grad] if case.backward else []
    return (lambda *tensors: _first(module(*tensors[: len(given)]))), [*inputs, *parameters]


def _first(output) -> torch.Tensor:
    """The output, or the first of several."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output


def load(target: str) -> torch.nn.Module:
    """The module that ``FILE.py:FUNCTION`` builds."""
    path, colon, name = target.rpartition(":")
    if not colon or not path:
        raise UnusableModule(f"expected FILE.py:FUNCTION, such as my_model.py:build, got {target}")
    if not Path(path).is_file():
        raise UnusableModule(f"no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UnusableModule(f"{path} is not a Python file")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        made = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = made
        spec.loader.exec_module(made)
        build = getattr(made, name, None)
        if build is None:
            public = [n for n, v in vars(made).items() if callable(v) and not n.startswith("_")]
            raise UnusableModule(f"{path} has no {name}: there are {', '.join(public) or 'no functions'}")
        torch.manual_seed(0)
        module = build()
    except UnusableModule:
        raise
    except Exception as error:
        raise UnusableModule(f"{target} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(module, torch.nn.Module):
        raise UnusableModule(f"{target} gave a {type(module).__name__}, expected a torch.nn.Module")
    if wrong := {p.dtype for p in module.parameters()} - {torch.float32}:
        raise UnusableModule(f"{target} has parameters in {wrong.pop()}, expected torch.float32")
    return module


def parse_input(text: str) -> torch.Tensor:
    """A random input by its shape, ``8x3x224x224``; with a limit, ``8x128:int1000``, integers from 0 to 999."""
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::int(\d+))?", text)
    if match is None:
        raise UnusableModule(
            f"cannot read the input {text}: expected a shape such as 8x3x224x224, or 8x128:int1000 for integers below 1000"
        )
    shape = tuple(map(int, match[1].split("x")))
    generator = torch.Generator().manual_seed(0)
    if match[2]:
        return torch.randint(int(match[2]), shape, generator=generator)
    return torch.randn(shape, generator=generator)


def cases(target: str, inputs: list[str], directions=()) -> list[Case]:
    """The whole module first, then each layer that fastnn replaces, with the input that it gets there."""
    import fastnn

    stock = load(target).eval()
    given = tuple(map(parse_input, inputs))
    ours = fastnn.convert(copy.deepcopy(stock))
    calls: dict[str, tuple] = {}
    handles = [layer.register_forward_hook(_recorder(name, calls)) for name, layer in _replaced(ours).items()]
    try:
        with torch.no_grad():
            stock(*given)
            ours(*given)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise UnusableModule(
            f"{target} does not run on inputs of shape {shapes}: {type(error).__name__}: {error}"
        ) from error
    for handle in handles:
        handle.remove()
    wanted = directions or USUAL
    name = target.rpartition(":")[2]
    pair = {"stock": stock, "fastnn": ours}
    made = _cases(type(stock).__name__, name, pair, given, wanted, whole=True)
    layers = _replaced(ours)
    for layer_name, layer_inputs in calls.items():
        layer = layers[layer_name]
        pair = {"stock": _counterpart(layer), "fastnn": copy.deepcopy(layer)}
        # A layer hands a gradient on, but for one that is fed with the model's own input.
        first = any(t.shape == x.shape and torch.equal(t, x) for t in layer_inputs for x in given)
        made += _cases(type(layer).__name__, layer_name, pair, layer_inputs, wanted, grad=not first)
    made = [c for c in made if not c.backward or any(t.requires_grad for t in c.call("stock")[1])]
    request = (target, tuple(inputs), tuple(directions))
    return [replace(c, source=(*request, i)) for i, c in enumerate(made)]


@cache
def _cases_again(target: str, inputs: tuple[str, ...], directions: tuple[str, ...]) -> list[Case]:
    return cases(target, list(inputs), directions)


def _case_again(target: str, inputs: tuple[str, ...], directions: tuple[str, ...], number: int) -> Case:
    return _cases_again(target, inputs, directions)[number]


def is_whole(case: Case) -> bool:
    """Whether a case is the user's module itself, not one of its layers."""
    return isinstance(case, ModuleCase) and case.whole


def _cases(
    op: str, origin: str, modules: dict, given: tuple, directions, *, grad: bool = False, whole: bool = False
) -> list[Case]:
    specs = tuple(Input(tuple(t.shape), grad=grad and t.is_floating_point()) for t in given)
    load = Workload(FAMILY, op, origin, specs)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is torch.float32)
    return [ModuleCase(load, dtype, "nchw", d, modules=modules, given=given, whole=whole) for d in directions]


def _recorder(name: str, calls: dict) -> Callable:
    def hook(module, inputs, output):
        if name not in calls and inputs and all(isinstance(t, torch.Tensor) for t in inputs):
            calls[name] = tuple(t.detach().clone() for t in inputs)

    return hook


def _replaced(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of fastnn's in a model by name; not those inside of another, nor the stack of encoder layers itself."""
    import fastnn.nn as nn

    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("fastnn.") or isinstance(module, nn.TransformerEncoder):
            continue
        if type(module).__name__ == "Fused" or not name:
            continue
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _counterpart(layer: torch.nn.Module) -> torch.nn.Module:
    """What torch has in place of a layer; several modules in place of a fused one."""
    import fastnn
    import fastnn.nn as nn

    made = copy.deepcopy(layer)
    if isinstance(layer, nn.LinearReLU):
        made.__class__ = torch.nn.Linear
        return torch.nn.Sequential(made, torch.nn.ReLU())
    if isinstance(layer, (nn.ConvReLU2d, nn.ConvReLUMaxPool2d)):
        made.__class__ = torch.nn.Conv2d
        after = [torch.nn.ReLU()]
        if isinstance(layer, nn.ConvReLUMaxPool2d):
            pool = (layer.pool_kernel_size, layer.pool_stride, layer.pool_padding)
            after.append(torch.nn.MaxPool2d(*pool))
        return torch.nn.Sequential(made, *after)
    return fastnn.revert(made)
