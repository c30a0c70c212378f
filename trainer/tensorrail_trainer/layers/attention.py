"""Multi-head attention whose projections are stored as tensor cores: those of query, key and value, that of its output, or all.

Torch packs the projections of query, key and value into one matrix (3·E, E), `in_proj_weight`; a plan names it as a whole. In
self-attention the cores project the input down to their rank once. Where query, key and value differ, each of them takes the
rows of the last core that belong to it. Attention with inputs of several widths has three matrices, `q_proj_weight`,
`k_proj_weight` and `v_proj_weight`. The projection of the output is a layer of its own, `out_proj`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorrail_trainer.layers._compat_torch import is_traced, keep_from_fused_kernels, node_of
from tensorrail_trainer.layers.factored import FactoredLayer

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The names of the weights of query, key and value: the first one alone, or the other three."""

Projection = nn.Parameter | FactoredLayer | None


class FactoredAttention(nn.Module):
    """An `nn.MultiheadAttention` in which some projections are lists of trainable cores.

    It has the inputs, outputs and attributes of the dense module. Parameters that stay dense keep their names, and are the same
    objects. A projection made of cores is a `FactoredLayer` under the name of its weight.

    Args:
        dense: the module to take sizes, options and dense parameters from; its `out_proj` may already be made of cores.
        factored: the layers in place of the weights of query, key and value, by the names of these weights; they have no bias.

    """

    in_proj_weight: Projection
    q_proj_weight: Projection
    k_proj_weight: Projection
    v_proj_weight: Projection
    in_proj_bias: nn.Parameter | None

    def __init__(self, dense: nn.MultiheadAttention, factored: Mapping[str, FactoredLayer]) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = dense.embed_dim, dense.kdim, dense.vdim
        self.num_heads, self.head_dim = dense.num_heads, dense.head_dim
        self.dropout, self.batch_first = dense.dropout, dense.batch_first
        self.bias_k = self.bias_v = None  # code of the model may read them, as from the dense module
        self.add_zero_attn = False
        for name in PROJECTIONS:
            if name in factored:
                self.register_module(name, factored[name])
            else:
                self.register_parameter(name, cast("nn.Parameter | None", getattr(dense, name)))
        self.register_parameter("in_proj_bias", cast("nn.Parameter | None", dense.in_proj_bias))
        self.out_proj: nn.Linear | FactoredLayer = dense.out_proj
        keep_from_fused_kernels(self)

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
        """Attend from query to key and value.

        Args:
            query: (L, B, E), (B, L, E) with `batch_first`, or (L, E).
            key: (S, B, kdim), (B, S, kdim) with `batch_first`, or (S, kdim).
            value: as `key`, with vdim features.
            key_padding_mask: (B, S), or (S) without a batch: True, or a number that is added, for each key.
            need_weights: whether to return the weights as well; without them torch's fused kernel runs.
            attn_mask: (L, S) or (B·heads, L, S): True where a query does not attend, or numbers that are added.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: a hint that `attn_mask`, which is then needed, is the causal mask.

        Returns:
            The output, as `query`, and the weights (B, L, S), (B, heads, L, S) if they are not averaged, or None.

        Raises:
            RuntimeError: sizes do not fit, or a tensor is nested.

        """
        if is_traced(query):
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return cast("tuple[Tensor, Tensor | None]", node_of(self, query, key, value, *options))
        mixed, weights = self._mixed(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if isinstance(self.out_proj, FactoredLayer):
            out = self.out_proj(mixed)
        else:  # as torch's attention, which reads its weight and calls neither a subclass's forward nor hooks
            out = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return out, weights

    def to_dense(self) -> nn.MultiheadAttention:
        """Return the dense module, with weights that are reconstructed from the cores."""
        like, biased = next(self.parameters()), self.in_proj_bias is not None
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=biased,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=like.device,
            dtype=like.dtype,
        )
        own: dict[str, Tensor | nn.Module | None] = {name: getattr(self, name) for name in (*PROJECTIONS, "in_proj_bias")}
        own |= {"out_proj.weight": self.out_proj, "out_proj.bias": self.out_proj.bias}
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                values, trained = _values(own[name])
                parameter.copy_(values).requires_grad_(trained)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, for the printed module; the layers below show their plans."""
        return f"{self.embed_dim}, heads={self.num_heads}, batch_first={self.batch_first}"

    def _mixed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values of all heads side by side, shaped as query, and the weights ([B, ]heads, L, S) if needed."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is the causal mask: expected attn_mask as well, got None")
        self._require_sizes(query, key, value)
        batched = query.dim() == 3
        q, k, v = (self._heads(features, batched) for features in self._projected(query, key, value))
        _require_masks(q, k, attn_mask, key_padding_mask, batched=batched)
        only_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if only_causal else self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=only_causal)
        mixed = mixed.transpose(1, 2)
        if batched and not self.batch_first:
            mixed = mixed.transpose(0, 1)
        mixed = mixed.flatten(-2)
        if batched:
            return mixed, weights
        return mixed.squeeze(0), None if weights is None else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return query, key and value projected to E features each; the same tensor is projected once."""
        size, bias = self.embed_dim, self.in_proj_bias
        parts: list[Tensor] = []
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = [_product(weight, x, 0, size) for weight, x in zip(weights, (query, key, value), strict=True)]
            return parts if bias is None else [x + b.to(x.dtype) for x, b in zip(parts, bias.chunk(3), strict=True)]
        runs: list[tuple[Tensor, int]] = []  # how often the same tensor follows itself
        for x in (query, key, value):
            if runs and runs[-1][0] is x:
                runs[-1] = (x, runs[-1][1] + 1)
            else:
                runs.append((x, 1))
        for x, count in runs:
            begin, end = len(parts) * size, (len(parts) + count) * size
            features = _product(self.in_proj_weight, x, begin, end)
            features = features if bias is None else features + bias[begin:end].to(features.dtype)
            parts += features.split(size, -1)
        return parts

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return features divided among the heads, (B, heads, L, E / heads)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the numbers that are added to the scores (B, heads, L, S), None for nothing."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).reshape(-1, 1, 1, key_padding_mask.shape[-1])
            mask = padding if mask is None else mask + padding
        return mask

    def _require_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise `RuntimeError` for inputs that the dense module would refuse: some of them would broadcast here."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise RuntimeError("attention made of cores takes padded tensors and key_padding_mask, got a nested tensor")
        axes = query.dim()
        if axes not in (2, 3) or not axes == key.dim() == value.dim():
            raise RuntimeError(
                f"expected query, key and value with 3 axes, or 2 without a batch, got {axes}, {key.dim()} and {value.dim()}"
            )
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if widths != (self.embed_dim, self.kdim, self.vdim):
            raise RuntimeError(
                f"expected query, key and value of {self.embed_dim}, {self.kdim} and {self.vdim} features, got {list(widths)}"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (axes == 3 and query.shape[batch] != key.shape[batch]):
            raise RuntimeError(
                "expected key and value of the same length, and a batch of the same size, got shapes "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )


def projections_of(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    """Return the names of the weights of query, key and value that this module has: one, or three of several widths."""
    return tuple(name for name in PROJECTIONS if getattr(attention, name, None) is not None)


def why_not(attention: nn.MultiheadAttention) -> str | None:
    """Return the reason why attention cannot be made of cores, or None."""
    if attention.bias_k is not None or attention.bias_v is not None:
        return "add_bias_kv=True adds a key and a value that no projection computes"
    if attention.add_zero_attn:
        return "add_zero_attn=True adds a key and a value of zeros"
    return None


def is_replaceable(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether a module is torch's attention, with parameters that nothing computes, so that cores can stand for it."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    own = {name for name, _ in module.named_parameters(recurse=False)}
    biases = () if module.in_proj_bias is None else ("in_proj_bias",)
    return why_not(module) is None and {*projections_of(module), *biases} <= own


@torch.compiler.disable  # type: ignore[untyped-decorator] # torch gives it no types
@torch.no_grad()
def heads_of(
    attention: nn.MultiheadAttention | FactoredAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return the mixed values of all heads, which `out_proj` multiplies, without dropout; the arguments are attention's.

    Raises `RuntimeError` for a nested tensor.
    """
    parts = copy.copy(attention) if isinstance(attention, FactoredAttention) else FactoredAttention(attention, {})
    parts.training = False  # of this object alone: the layers in it are shared
    mixed, _ = parts._mixed(query, key, value, key_padding_mask, False, attn_mask, is_causal)
    return mixed


def _require_masks(q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, *, batched: bool) -> None:
    """Raise `RuntimeError` for masks that the dense module would refuse for these heads: some of them would broadcast."""
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    if attn_mask is not None and attn_mask.shape not in ((length, keys), (batch * heads, length, keys)):
        raise RuntimeError(
            f"attn_mask: expected shape {[length, keys]} or {[batch * heads, length, keys]}, got {list(attn_mask.shape)}"
        )
    expected = (batch, keys) if batched else (keys,)
    if padding is not None and padding.shape != expected:
        raise RuntimeError(f"key_padding_mask: expected shape {list(expected)}, got {list(padding.shape)}")


def _product(weight: Projection, x: Tensor, begin: int, end: int) -> Tensor:
    """Return the product of the rows `begin` to `end` of a weight with the features of x."""
    if isinstance(weight, FactoredLayer):
        return weight.part(x, begin, end)
    return F.linear(x, cast(Tensor, weight)[begin:end])


def _values(source: Tensor | nn.Module | None) -> tuple[Tensor, bool]:
    """Return the values of a parameter, or of a layer's weight, and whether they are trained."""
    if isinstance(source, FactoredLayer):
        return source.dense_weight(), source.cores[0].requires_grad
    values = cast(Tensor, source.weight if isinstance(source, nn.Linear) else source)
    return values, values.requires_grad


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add: minus infinity where it is True."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"expected boolean masks or masks of floating-point numbers, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
