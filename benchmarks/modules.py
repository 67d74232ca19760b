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
    layers = _replaced(ours)
    handles = [members[0].register_forward_hook(_recorder(name, calls)) for name, members in layers.items()]
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
    for layer_name, layer_inputs in calls.items():
        alone = [copy.deepcopy(layer) for layer in layers[layer_name]]
        layer = alone[0] if len(alone) == 1 else torch.nn.Sequential(*alone)
        pair = {"stock": _counterpart(layer), "fastnn": fastnn.convert(layer)}
        # A layer hands a gradient on, but for one that is fed with the model's own input.
        first = any(t.shape == x.shape and torch.equal(t, x) for t in layer_inputs for x in given)
        made += _cases(
            "+".join(type(m).__name__ for m in alone), layer_name, pair, layer_inputs, wanted, grad=not first
        )
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


class _ByTorch(torch.nn.Module):
    """A layer that torch has not, such as a LinearReLU, by torch's ops."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer.stock_forward(self.layer.as_torch(), *inputs)


def _counterpart(layer: torch.nn.Module) -> torch.nn.Module:
    """The same layer, or the same layers, of torch."""
    import fastnn
    from fastnn.nn._layer import LAYERS

    made = copy.deepcopy(layer)
    declared = LAYERS.get(type(made))
    return fastnn.revert(made) if declared is None or declared.torchs else _ByTorch(made)


def _replaced(model: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    """The layers of fastnn's in a model by name, each with those after it that run with it as one.

    Not those inside of another, nor what only holds others: containers and the stack of encoder layers.
    """
    import fastnn.nn as nn
    from fastnn.nn._layer import LAYERS
    from fastnn.nn.container import groups

    after: dict[torch.nn.Module, list[torch.nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for first, *others in groups(module):
                after[module._modules[first]] = [module._modules[name] for name in others]
    found: dict[str, list[torch.nn.Module]] = {}
    for name, module in model.named_modules():
        if (
            not name
            or type(module) not in LAYERS
            or isinstance(module, (nn.Sequential, nn.TransformerEncoder))
        ):
            continue
        in_another = any(name.startswith(f"{outer}.") for outer in found)
        if not in_another and not any(module in members for members in found.values()):
            found[name] = [module, *after.get(module, [])]
    return found
