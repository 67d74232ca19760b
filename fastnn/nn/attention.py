"""Multi-head attention. As :mod:`torch.nn.attention` it also hands on torch's names and submodules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.attention
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention import *  # noqa: F403

from fastnn.nn import _stand_in
from fastnn.nn._layer import Layer, declare_layer, is_traced, traced
from fastnn.nn._multi_head_attention import Call, Packed, attend, masks_fit
from fastnn.ops.core.packed_weight import PackedWeight

__all__ = ["MultiheadAttention"]


@declare_layer(
    torch.nn.MultiheadAttention,
    packs={
        "_packed_in": lambda layer: None if layer.in_proj_weight is None else (layer.in_proj_weight, 1),
        "_packed_out": lambda layer: (layer.out_proj.weight, 1),
    },
)
class MultiheadAttention(Layer, torch.nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` on fastnn's kernels.

    Arguments, shapes, initial values and ``state_dict`` are torch's. Pass ``need_weights=False`` where the weights
    are not used: only then is the matrix of all weights never formed.

    Training and inference take the same way here, that of torch in training. Torch's own shortcut in inference
    differs from it in three cases: a query whose keys are all masked (NaN there), a float mask given to
    :class:`torch.nn.TransformerEncoderLayer` (taken for a boolean one there), and ``is_causal=True`` without a mask
    (ignored there, an error here).
    """

    # Of the projections of self-attention and of the result, where fastnn.freeze made them.
    _packed_in: PackedWeight | None = None
    _packed_out: PackedWeight | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`; see :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_traced(query) or is_traced(key) or is_traced(value):
            return traced(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        packed = self._qkv_same_embed_dim
        out_proj = self.out_proj
        call = Call(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight if packed else None,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            out_proj.weight,
            out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not packed,
            q_proj_weight=None if packed else self.q_proj_weight,
            k_proj_weight=None if packed else self.k_proj_weight,
            v_proj_weight=None if packed else self.v_proj_weight,
            static_k=None,
            static_v=None,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        masked = key_padding_mask is not None or attn_mask is not None
        if masked and query.dim() == key.dim() == 3 and not masks_fit(call, self.batch_first):
            # What torch's module raises depends on whether its fast path takes the call.
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        dense = self._lies_densely(query, key, value, key_padding_mask, attn_mask)
        packed_weights = Packed(self._packed_in, self._packed_out)
        return attend(call, self.batch_first and query.dim() == 3, packed_weights, dense)

    def _lies_densely(self, query, key, value, key_padding_mask, attn_mask) -> bool:
        """Whether torch would take its shortcut in inference, whose result lies in memory as its shape says."""
        if self.training or not self.batch_first or query is not key or key is not value or query.dim() != 3:
            return False
        if (
            self.in_proj_bias is None
            or self.num_heads % 2 != 0
            or self.bias_k is not None
            or self.add_zero_attn
            or not self._qkv_same_embed_dim
            or any(mask is not None and mask.is_floating_point() for mask in (key_padding_mask, attn_mask))
            or torch.is_autocast_enabled()
            or not torch.backends.mha.get_fastpath_enabled()
        ):
            return False
        if not torch.is_grad_enabled():
            return True
        out_proj = self.out_proj
        tensors = (query, self.in_proj_weight, self.in_proj_bias, out_proj.weight, out_proj.bias)
        return not any(t is not None and t.requires_grad for t in tensors)


if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = _stand_in.hand_on(torch.nn.attention, globals())
    __path__: list[str] = []  # a package, whose modules are all torch's
