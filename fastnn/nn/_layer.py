"""What a layer of fastnn says of itself: torch's layer that it stands for, what it may run with, which weights it packs.

:func:`fastnn.convert`, :func:`fastnn.revert` and :func:`fastnn.freeze` are loops over that and know no class by name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module

from fastnn.ops.core.packed_weight import PackedWeight


class Fusion(NamedTuple):
    """What a layer does in one op with the layers that follow it."""

    after: tuple[type[Module], ...]  # their classes, exactly
    run: Callable  # run(layer, input, *followers) -> what the last of them would give
    fits: Callable = lambda *followers: True  # fits(*followers): whether `run` does what these do


# What torch's activations are called among those that stand behind a product, and which of them that holds for.
ACTIVATIONS: tuple[tuple[type[Module], str, Callable], ...] = (
    (torch.nn.GELU, "gelu", lambda layer: layer.approximate == "none"),
    (torch.nn.GELU, "gelu_tanh", lambda layer: layer.approximate == "tanh"),
    (torch.nn.SiLU, "silu", lambda layer: True),
    (torch.nn.ReLU6, "relu6", lambda layer: (layer.min_val, layer.max_val) == (0.0, 6.0)),
    (torch.nn.Hardswish, "hardswish", lambda layer: True),
    (torch.nn.Sigmoid, "sigmoid", lambda layer: True),
    (torch.nn.Tanh, "tanh", lambda layer: True),
)


def with_activations(run: Callable) -> tuple[Fusion, ...]:
    """The fusions of a layer with each of these: ``run(layer, input, name)``."""

    def fusion(cls, name, fits):
        return Fusion((cls,), lambda layer, input, activation: run(layer, input, name), fits)

    return tuple(fusion(*activation) for activation in ACTIVATIONS)


class Declaration(NamedTuple):
    """What a class of layers says of itself."""

    torchs: type[Module] | None  # torch's class with the same state; None where torch has no such layer
    inherited: bool  # whether it stands for the subclasses of `torchs` that have no forward of their own, too
    packs: dict[
        str, Callable
    ]  # by attribute, packs[...](layer) -> (weight, groups) of what is read packed, or None


# By class of fastnn.
LAYERS: dict[type[Module], Declaration] = {}

# Ours by torch's.
_OURS: dict[type[Module], type[Module]] = {}

# By class, and by the class of the layer that follows; of several the longest stands first.
FUSIONS: dict[type[Module], dict[type[Module], list[Fusion]]] = {}


def declare_layer(
    torchs: type[Module] | None = None,
    *,
    inherited: bool = False,
    fuses: tuple[Fusion, ...] = (),
    packs: dict[str, Callable] | None = None,
) -> Callable:
    """A decorator that declares a class of layers; see :class:`Declaration` and :class:`Fusion`."""

    def declare(cls: type[Module]) -> type[Module]:
        LAYERS[cls] = Declaration(torchs, inherited, packs or {})
        if torchs is not None:
            _OURS[torchs] = cls
        for fusion in sorted(fuses, key=lambda fusion: -len(fusion.after)):
            FUSIONS.setdefault(cls, {}).setdefault(fusion.after[0], []).append(fusion)
        return cls

    return declare


class _QConfig:
    """``module.qconfig``, by which torch.ao.quantization marks the modules that it walks over."""

    def __get__(self, module: Module | None, owner: type):
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Module, value: Any) -> None:
        if "qconfig" not in module.__dict__ and _is_quantized_by_torch(type(module)):
            warnings.warn(
                f"torch.ao.quantization knows layers by torch's exact classes and leaves {type(module).__name__} of fastnn "
                "as it is: call fastnn.revert(model) first, and fastnn.convert on what is left afterwards",
                stacklevel=3,
            )
        module.__dict__["qconfig"] = value

    def __delete__(self, module: Module) -> None:
        try:
            del module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None


def _is_quantized_by_torch(cls: type[Module]) -> bool:
    from torch.ao.quantization import quantization_mappings as known

    torchs = _torchs_ancestor(cls)
    mappings = (
        known.get_default_static_quant_module_mappings(),
        known.get_default_dynamic_quant_module_mappings(),
        known.get_default_qat_module_mappings(),
    )
    return any(torchs in mapping for mapping in mappings)


class Layer:
    """What the layers of fastnn have beside what torch's have."""

    qconfig = _QConfig()

    def as_torch(self) -> Module:
        """Torch's layer of the same state: not a copy, both share parameters, buffers, hooks and attributes."""
        torchs = class_of_torchs(type(self)) or _torchs_ancestor(type(self))
        layer = torchs.__new__(torchs)
        object.__setattr__(layer, "__dict__", self.__dict__)
        return layer

    def stock_forward(self, torchs: Module, *args, **kwargs):
        """What the layer does, by torch's forward of the same state."""
        return type(torchs).forward(torchs, *args, **kwargs)

    def _slow_forward(self, *args, **kwargs):
        """What torch calls in place of forward while torch.jit.trace records: torch's layer, whose ops run anywhere."""
        if type(self) in LAYERS and "forward" not in self.__dict__:
            return self.stock_forward(self.as_torch(), *args, **kwargs)
        return super()._slow_forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> Module:
        """What torch.jit.script compiles in place of the layer: torch's, where there is one.

        Torch puts it into the module that holds the layer.
        """
        if class_of_torchs(type(self)) is None:
            return self
        layer = self.as_torch()
        state = {**self.__dict__, "_modules": self._modules.copy()}
        for name, _ in _packs_of(self):
            state.pop(name, None)
        object.__setattr__(layer, "__dict__", state)
        return layer

    def train(self, mode: bool = True):
        """As :meth:`torch.nn.Module.train`; what is trained reads no packed weights from then on."""
        if mode:
            drop_packs(self)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, weight_of in _packs_of(self):
            if packed := self.__dict__.get(name):
                packed.renew(*(weight_of(self) or (None,)))
        return self


def _torchs_ancestor(cls: type[Module]) -> type[Module]:
    return next(c for c in cls.__mro__ if issubclass(c, Module) and c.__module__.startswith("torch."))


# ---- what convert, revert and freeze ask ----


def class_of_ours(cls: type[Module]) -> type[Module] | None:
    """The class that a layer of torch's, or of a subclass without a forward of its own, becomes; None if there is none."""
    if cls in _OURS:
        return _OURS[cls]
    if issubclass(cls, Layer) or cls.__module__.startswith("torch."):
        return None
    for ours, declared in LAYERS.items():
        if declared.inherited and issubclass(cls, declared.torchs):
            same = all(
                getattr(cls, name) is getattr(declared.torchs, name) for name in ("forward", "__iter__")
            )
            return _derived(ours, cls) if same else None
    return None


def class_of_torchs(cls: type[Module]) -> type[Module] | None:
    """The class that :func:`class_of_ours` was asked about; None where torch has no such layer."""
    return vars(cls).get("_stands_for") or (LAYERS[cls].torchs if cls in LAYERS else None)


def _derived(ours: type[Module], base: type[Module]) -> type[Module] | None:
    """A class that is `base` with the forward of `ours`, under the name of `base`; None where none can be made."""
    for cls in base.__subclasses__():  # one for each base, for as long as something is of it
        if vars(cls).get("_stands_for") is base:
            return cls
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_derived,
        "_stands_for": base,
    }
    try:
        return type(base)(base.__name__, (ours, base), namespace)
    except Exception:  # such as an __init_subclass__ that wants arguments
        return None


def _reduce_derived(self, protocol):
    """Copies and pickles name the base, since no module holds the class that was made of it."""
    cls = type(self)
    base = vars(cls).get("_stands_for")
    if base is None:  # of a subclass of the class that was made
        return object.__reduce_ex__(self, protocol)
    made = super(cls, self).__reduce_ex__(max(protocol, 2))
    arguments = made[1]
    if not arguments or arguments[0] is not cls:
        return made  # the base's own way of being copied
    return (_again, (base, *arguments[1:]), *made[2:])


def _again(base: type[Module], *arguments):
    cls = class_of_ours(base) or base
    return cls.__new__(cls, *arguments)


def _packs_of(layer: Module):
    declared = LAYERS.get(type(layer))
    return declared.packs.items() if declared is not None else ()


def make_packs(model: Module) -> None:
    """Give each layer of a model the packed form of the weights that it reads so; one to all that share a weight."""
    made: dict[Tensor, PackedWeight] = {}
    for layer in model.modules():
        for name, weight_of in _packs_of(layer):
            weight, groups = weight_of(layer) or (None, 1)
            if weight is not None and PackedWeight.can_hold(weight):
                if weight not in made:
                    made[weight] = PackedWeight(weight, groups)
                layer.__dict__[name] = made[weight]


def drop_packs(layer: Module, which: Callable[[PackedWeight], bool] = lambda packed: True) -> None:
    """Take a layer's packed weights away, those for which `which` holds."""
    for name, _ in _packs_of(layer):
        if (packed := layer.__dict__.get(name)) is not None and which(packed):
            del layer.__dict__[name]


# ---- torch.fx ----


def is_traced(input: Any) -> bool:
    """Whether torch.fx records the call that has this argument."""
    return type(input) is not Tensor and isinstance(input, Proxy)


def traced(layer: Layer, *args, **kwargs):
    """What torch.fx records of a layer: what it would of torch's, for most tracers one node that calls the module.

    A layer that is more than its class says, by hooks or a forward of its own, would run that twice: once while it is traced,
    once in the node. It is traced through, and so is one of a subclass.
    """
    torchs, tracer = layer.as_torch(), next(a for a in args if isinstance(a, Proxy)).tracer
    if type(layer) in LAYERS and is_plain(layer) and hasattr(tracer, "path_of_module"):
        path = tracer.path_of_module(layer)
        if tracer.is_leaf_module(torchs, path):
            _tell_who_looks_for_torchs()
            return tracer.create_proxy("call_module", path, args, kwargs)
    return layer.stock_forward(torchs, *args, **kwargs)


def _tell_who_looks_for_torchs() -> None:
    frame = sys._getframe()
    while frame is not None:
        if (
            frame.f_code.co_name == "fuse"
            and frame.f_globals.get("__name__") == "torch.fx.experimental.optimization"
        ):
            warnings.warn(
                "torch.fx.experimental.optimization.fuse knows layers by torch's exact classes and folds nothing into those of "
                "fastnn: call fastnn.revert(model) first",
                stacklevel=2,
            )
            return
        frame = frame.f_back


# ---- layers run as parts of a fused op ----


def is_plain(module: Module) -> bool:
    """Whether a call of a module is its forward and nothing else: no hook, no forward of the instance, not compiled."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
