"""How fastnn.nn and its submodules hand the names that they do not hold on to torch's modules of the same name."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_OURS = "fastnn.nn"
_TORCHS = "torch.nn"


def hand_on(torchs: ModuleType, ours: dict):
    """``__getattr__``, ``__dir__`` and ``__all__`` of the module with globals `ours`, which stands in for `torchs`."""

    def __getattr__(name: str):
        if not name.startswith("__"):  # __path__, __wrapped__ and their like are not torch's to answer
            try:
                value = getattr(torchs, name)
            except AttributeError:
                pass
            else:
                ours[name] = value  # found without this function from now on
                return value
        raise AttributeError(f"neither module {ours['__name__']!r} nor {torchs.__name__!r} has {name!r}")

    def __dir__():
        return sorted({*ours, *dir(torchs)})

    public = {name for name in dir(torchs) if not name.startswith("_")}
    return __getattr__, __dir__, sorted(public.union(ours["__all__"]))


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes ``import fastnn.nn.utils.rnn`` give the module torch.nn.utils.rnn itself, never a second copy of it."""

    own = frozenset(path.stem for path in Path(__file__).parent.glob("*.py"))

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_OURS + ".") or fullname[len(_OURS) + 1 :] in self.own:
            return None
        try:
            found = importlib.util.find_spec(_TORCHS + fullname[len(_OURS) :])
        except ModuleNotFoundError:
            return None
        return found and importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec):
        module = importlib.import_module(_TORCHS + spec.name[len(_OURS) :])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        # The import system has just put the stand-in's spec on torch's module; its own goes back.
        module.__spec__ = module.__spec__.loader_state


def hand_on_submodules() -> None:
    """Let the import of any submodule of fastnn.nn that is not ours give torch.nn's."""
    sys.meta_path.insert(0, _Submodules())
