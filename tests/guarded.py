"""Memory beside pages that must not be touched: what reads or writes past its end, or before its start, ends the process.

Sanitizers watch what was allocated one by one, and neither masked vector loads nor another library's kernels.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# A fault says which call it was.
if not faulthandler.is_enabled():
    faulthandler.enable()


def memory(size, at_end=True):
    """``size`` bytes, uint8, that end where a forbidden page begins, or begin where one ends; with its neighbours mapped.

    Parameters
    ----------
    size : int
        Number of bytes, at least 1.
    at_end : bool
        Whether the page behind it is the near one.

    Returns
    -------
    numpy.ndarray
        It owns the mapping.
    """
    pages = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, pages + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (start, start + PAGE + pages):
        if _libc.mprotect(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return np.frombuffer(mapping, np.uint8, size, PAGE + (pages - size if at_end else 0))


def array(a, at_end=True):
    """A copy of an array, of its strides, in :func:`memory`."""
    if a.size == 0:
        return a.copy()
    span = sum((n - 1) * step for n, step in zip(a.shape, a.strides, strict=True)) + a.itemsize
    bytes = memory(span, at_end)
    out = np.ndarray(a.shape, a.dtype, bytes.data, 0, a.strides)
    out[...] = a
    return out
