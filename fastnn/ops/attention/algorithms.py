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


def _describe(query, key, value, mask, is_causal, scale) -> Call:
    wants = torch.is_grad_enabled() and any([t.requires_grad for t in (query, key, value)])
    return _call(query, key, value, mask, is_causal, "training" if wants else "inference")


def _result(describe, first=0) -> Result:
    """`first`: the place of the query among the op's arguments."""

    def covering(*args):
        return ask("_attention_covering", *_told(*args[first : first + 3]))

    def automatic(*args):
        return ask("_attention_automatic", *_told(*args[first : first + 3]))

    return Result(covering, automatic, describe)


def _describe_gradients(grad, query, key, value, mask, output, statistics, is_causal, scale) -> Call:
    return _call(query, key, value, mask, is_causal, "gradients")


FORWARD = Algorithms(_BY_NUMBER, (_result(_describe),))
GRADIENTS = Algorithms(_BY_NUMBER, (_result(_describe_gradients, 1),))
