"""The algorithms of attention on the CPU, as ``csrc/cpu/attention.h`` names them, and what decides among them."""

from __future__ import annotations

import torch

from fastnn.ops.core.algorithms import NAMES, NUMBERS, Algorithms, Result, ask
from fastnn.ops.core.rules import Call

_BY_NUMBER = tuple(ask("_attention_algorithms").split(","))


def _told(query, key, value):
    """A call in numbers, as the library asks for it."""
    batch, heads, queries, width = query.shape
    shape = (batch, heads, key.shape[1], queries, key.shape[2], width, value.shape[3])
    return NUMBERS[query.dtype], shape


def _call(query, key, value, mask, is_causal, what) -> Call:
    batch, heads, queries, width = query.shape
    kind = f"{NAMES[query.dtype]} {what}"
    if is_causal:
        kind += " causal"
    elif mask is not None:
        kind += " masked"
    keys = key.shape[2]
    work = batch * heads * queries * keys * (width + value.shape[3])
    sizes = {"heads": batch * heads, "queries": queries, "keys": keys, "width": width, "work": work}
    return Call(kind, sizes)


def _wants(query, key, value) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for t in (query, key, value)])


def _describe(query, key, value, mask, is_causal, scale) -> Call:
    return _call(query, key, value, mask, is_causal, "training" if _wants(query, key, value) else "inference")


def _automatic(query, key, value, *rest) -> int:
    return ask("_attention_automatic", *_told(query, key, value))


def _covering(query, key, value, *rest) -> int:
    told = _told(query, key, value)
    if _wants(query, key, value):
        # Backward makes the scores anew, and has to sum them in the order in which forward did: both are the library's choice.
        return 1 | 1 << ask("_attention_automatic", *told)
    return ask("_attention_covering", *told)


FORWARD = Algorithms(_BY_NUMBER, (Result(_covering, _automatic, _describe),))
