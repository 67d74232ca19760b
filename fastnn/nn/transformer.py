"""The transformer encoder and its layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from fastnn.nn._layer import Layer, declare_layer, is_plain, is_traced, traced
from fastnn.nn.attention import MultiheadAttention
from fastnn.nn.container import fusion_at, may_fuse
from fastnn.nn.linear import Linear, with_activation, with_relu
from fastnn.ops.norm import add_layer_norm

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


def _add_norm(
    norm: Module, x: Tensor, residual: Tensor, with_sum: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``norm(x + residual)``, in one pass where that is layer normalization alone, and if asked for the sum."""
    if (
        type(norm) is not torch.nn.LayerNorm
        or not is_plain(norm)
        or not may_fuse()
        or len(norm.normalized_shape) != 1
    ):
        total = x + residual
        return norm(total), total
    out = add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, with_sum=with_sum)
    return out if with_sum else (out, None)


@declare_layer(torch.nn.TransformerEncoderLayer)
class TransformerEncoderLayer(Layer, torch.nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` on fastnn's kernels.

    Arguments, shapes, names of the submodules, initial values and ``state_dict`` are torch's. The first linear layer
    and a ReLU after it are one op, and so are a residual connection and the normalization after it; GELU is part of
    the op in inference. See :class:`MultiheadAttention` for the three cases in which torch's shortcut in inference gives
    something else; here there is a fourth, an activation ``GELU("tanh")`` (taken for GELU itself there).
    """

    def __init__(self, *args, **kwargs) -> None:
        # torch's constructor draws the initial values; then its layers become ours, which hold the same state.
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.linear1.__class__ = self.linear2.__class__ = Linear

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass the input through the layer; see :meth:`torch.nn.TransformerEncoderLayer.forward`."""
        if is_traced(src):
            return traced(
                self, src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            if not (self.training or src.is_contiguous()) and self._lies_densely(
                src, src_mask, src_key_padding_mask
            ):
                x = src.contiguous()
            attended = self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            normal, x = _add_norm(self.norm2, x, attended)
            return x + self._ff_block(normal)
        x, _ = _add_norm(self.norm1, x, self._sa_block(x, src_mask, src_key_padding_mask, is_causal), False)
        return _add_norm(self.norm2, x, self._ff_block(x), False)[0]

    def _lies_densely(self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether torch would take its shortcut in inference, whose result does not lie as the input does."""
        attention = self.self_attn
        return isinstance(attention, MultiheadAttention) and attention._lies_densely(
            src, src, src, key_padding_mask, mask
        )

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self._first_with_activation(x))))

    def _first_with_activation(self, x: Tensor) -> Tensor:
        linear, activation = self.linear1, self.activation
        if may_fuse():
            if isinstance(activation, Module):
                if fused := fusion_at([linear, activation], 0):
                    return fused[0].run(linear, x, activation)
            elif type(linear) is Linear and is_plain(linear):
                if activation is torch.nn.functional.relu:
                    return with_relu(linear, x)
                if activation is torch.nn.functional.gelu:
                    return with_activation(linear, x, "gelu")
        return activation(linear(x))


@declare_layer(torch.nn.TransformerEncoder)
class TransformerEncoder(Layer, torch.nn.TransformerEncoder):
    """:class:`torch.nn.TransformerEncoder` on fastnn's kernels.

    Takes layers of fastnn and of torch. Where torch would run nested tensors in inference (`enable_nested_tensor`),
    whose padded positions come out as zeros, they come out as zeros here too.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass the input through the layers in turn; see :meth:`torch.nn.TransformerEncoder.forward`."""
        if is_traced(src):
            return traced(
                self, src, mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
        if src.is_nested or not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if is_causal is None:
            is_causal = _is_causal_mask(mask, src, self.layers[0].self_attn.batch_first)
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask
            )
        if src_key_padding_mask is not None and self._drops_padding(src, mask, src_key_padding_mask):
            output = output.masked_fill(_left_out(src_key_padding_mask).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _drops_padding(self, src: Tensor, mask: Tensor | None, src_key_padding_mask: Tensor) -> bool:
        """Whether torch would pack the sequences into a nested tensor, leaving their padding out."""
        first = self.layers[0]
        if (
            not self.use_nested_tensor
            or first.training
            or src.dim() != 3
            or mask is not None
            or torch.is_autocast_enabled()
            or not torch.backends.mha.get_fastpath_enabled()
            or (torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters())))
        ):
            return False
        if not getattr(self, "mask_check", True):
            return True
        # Torch packs only sequences whose padding is at their ends, and does not look while a graph is traced.
        return not torch.compiler.is_compiling() and torch._nested_tensor_from_mask_left_aligned(
            src, _left_out(src_key_padding_mask).logical_not()
        )


def _left_out(key_padding_mask: Tensor) -> Tensor:
    """The boolean form of a mask of either kind."""
    return key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == float("-inf")


def _is_causal_mask(mask: Tensor | None, src: Tensor, batch_first: bool) -> bool:
    """Whether a mask leaves out exactly the future; no while a graph is traced, which cannot branch on values."""
    if mask is None or torch.compiler.is_compiling():
        return False
    length = src.shape[1 if batch_first and src.dim() == 3 else 0]
    if mask.shape != (length, length):
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.is_floating_point():
        future = torch.zeros_like(mask).masked_fill_(future, float("-inf"))
    return mask.dtype == future.dtype and torch.equal(mask, future)
