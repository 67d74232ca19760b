"""Whether a call on a GPU may go to a CUDA or Triton kernel."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch

from fastnn.ops.core.tracing import constant_result

#: The candidates in CUDA C++ that only GPUs of compute capability 9.0 run.
WARPGROUPS = "warpgroups"
#: The same with blocks in pairs that copy half of what they share each.
PAIRS = "warpgroups in pairs"
#: The least compute capability that the kernels are built for.
LEAST_CAPABILITY = (8, 0)


#: Kernels whose blocks wait for each other, and that no GPU has run: `fastnn.tune` leaves them to the benchmark suite, which ends
#: what hangs.
UNTRIED = frozenset((PAIRS,))


@cache
def architectures() -> str:
    """What the library's CUDA kernels are built for, such as ``80-real 90a-real``; empty if it has none."""
    return torch.ops.fastnn._cuda_architectures()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is one of compute capability 9.0 and the library holds the kernels that only such GPUs run."""
    return (
        device.type == "cuda"
        and "90a-real" in architectures().split()
        and _capability(device.index) == (9, 0)
    )


def has_descriptors(device: torch.device) -> bool:
    """Whether a GPU copies the tiles that a tensor descriptor tells of: from compute capability 9.0 on."""
    return _capability(device.index) >= (9, 0)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# A tracer need not look into it: what it says holds for the whole process.
@constant_result
@cache
def _unusable(kind: str, index: int) -> str | None:
    reason = _cause(kind, index)
    if reason is not None:
        warnings.warn(f"fastnn leaves calls on this GPU to torch: {reason}", stacklevel=2)
    return reason


def _cause(kind: str, index: int) -> str | None:
    if kind == "cuda" and not architectures():
        return "this build holds no CUDA kernels"
    if kind == "triton" and not _has_triton():
        return "Triton is not installed"
    capability = _capability(index)
    if capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        return f"GPU kernels need compute capability {least}, this GPU has {own}"
    return None


def why_not(tensor: torch.Tensor, kind: str | None) -> str | None:
    """Why no kernel of a kind, "cuda" or "triton" (or None: there is none), can take a tensor on a GPU, or None."""
    if kind is None or not tensor.is_cuda:
        return f"no kernel for device {tensor.device.type}"
    if kind == "triton" and tensor.dtype is torch.float64:
        return "no Triton kernel for torch.float64"
    return _unusable(kind, tensor.device.index)
