"""Attention written out in its steps, so that the operands of its two products can be quantized."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError

Quantize = Callable[..., tuple[Tensor, ...]]
"""Maps the operands of a call to the operands it is to be made with."""

_FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def scaled_dot_product(func: Callable[..., Tensor], args: Any, kwargs: Any, scores: Quantize | None, mix: Quantize | None) -> Tensor:
    """Return what ``F.scaled_dot_product_attention(*args, **kwargs)`` does on quantized operands.

    Args:
        func: the function itself; it still runs where only q·k is quantized, or nothing.
        args: its positional arguments.
        kwargs: its keyword arguments.
        scores: quantizes query and key, or None.
        mix: quantizes the attention weights and the values, or None.
    """
    given = {**dict(zip(_FUSED, args, strict=False)), **kwargs}
    if scores is not None:
        given["query"], given["key"] = scores(given["query"], given["key"])
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    if mix is None or (mask is not None and causal):  # the second is torch's own error
        return func(**given)
    query, key, value = given["query"], given["key"], given["value"]
    weigh = mix
    if given.get("enable_gqa", False):
        repeats = query.shape[-3] // key.shape[-3], query.shape[-3] // value.shape[-3]
        key = key.repeat_interleave(repeats[0], -3)

        def weigh(weights: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            weights, value = mix(weights, value)
            return weights, value.repeat_interleave(repeats[1], -3)

    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = blocked(mask.logical_not(), query.dtype)
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attend(query, key, value, mask, scale=scale, dropout=given.get("dropout_p", 0.0), mix=weigh)[0]


def blocked(where: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the term that is added to attention scores to block those that are True."""
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, -math.inf)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    mix: Quantize | None,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return softmax(q·kᵀ·scale + mask)·v and the attention weights it used.

    Args:
        query: ``[…, L, d]``.
        key: ``[…, S, d]``.
        value: ``[…, S, e]``.
        mask: added to the scores, broadcastable to ``[…, L, S]``.
        scale: factor of the scores.
        dropout: share of the weights that is dropped.
        mix: quantizes weights and values.
        plain: a query that may look at nothing gives nan, as softmax does; else zero, as torch's fused attention does.
    """
    scores = (query * scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if not plain and mask is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    if mix is not None:
        weights, value = mix(weights, value)
    if dropout:  # after quantization: the kept weights grow by 1/(1 - dropout), out of the range that evaluation has
        weights = F.dropout(weights, dropout)
    return weights @ value, weights


def multihead(owner: nn.MultiheadAttention, calls: Mapping[str, Quantize], args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return what ``F.multi_head_attention_forward(*args, **kwargs)`` does, with quantized operands.

    Args:
        owner: the module that makes the call; its ``out_proj`` runs as a module, so that it may be a `QuantLayer`.
        calls: by key: ``0`` (or ``0``, ``1``, ``2``) the input projections, ``qk`` and ``av`` the products.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.

    Raises:
        BitwrightError: the call has static keys or values, a foreign output projection, or a mask of the wrong shape.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["static_k"] is not None or given["static_v"] is not None:
        raise BitwrightError("quantized nn.MultiheadAttention: static_k and static_v are not supported; name the module in skip=")
    if given["out_proj_weight"] is not owner.out_proj.weight:
        raise BitwrightError("quantized nn.MultiheadAttention: its output projection is not its out_proj; name the module in skip=")
    batched = given["query"].dim() == 3
    query, key, value = _batch_first(given, batched)
    query, key, value = _project(given, calls, query, key, value)
    if given["bias_k"] is not None:
        n = len(key)
        key = torch.cat([key, given["bias_k"].expand(n, -1, -1)], 1)
        value = torch.cat([value, given["bias_v"].expand(n, -1, -1)], 1)
    q, k, v = (x.view(*x.shape[:2], given["num_heads"], -1).transpose(1, 2) for x in (query, key, value))
    if given["add_zero_attn"]:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = _mask(given, q, k)
    if "qk" in calls:
        q, k = calls["qk"](q, k)
    dropout = given["dropout_p"] if given["training"] else 0.0
    needed = bool(given["need_weights"])
    out, weights = attend(q, k, v, mask, scale=1 / math.sqrt(q.shape[-1]), dropout=dropout, mix=calls.get("av"), plain=needed)
    out = cast(Tensor, owner.out_proj(out.transpose(1, 2).flatten(2))).transpose(0, 1)
    if needed and given["average_attn_weights"]:
        weights = weights.mean(1)
    if not batched:
        out, weights = out.squeeze(1), weights.squeeze(0)
    return out, weights if needed else None


def _batch_first(given: Mapping[str, Any], batched: bool) -> tuple[Tensor, ...]:
    """Return query, key and value as ``[N, tokens, width]``; what was one tensor stays one."""
    moved: dict[int, Tensor] = {}
    inputs = [given[name] for name in ("query", "key", "value")]
    for x in inputs:
        if id(x) not in moved:
            moved[id(x)] = x.transpose(0, 1) if batched else x[None]
    return tuple(moved[id(x)] for x in inputs)


def _project(given: Mapping[str, Any], calls: Mapping[str, Quantize], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return the projected query, key and value."""
    inputs = [query, key, value]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
        for i, name in enumerate("012"):
            if name in calls:
                inputs[i], weights[i] = calls[name](inputs[i], weights[i])
    else:
        weight = given["in_proj_weight"]
        if "0" in calls:
            *inputs, weight = calls["0"](*inputs, weight)
        weights = list(weight.chunk(3))
    bias = given["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))


def _mask(given: Mapping[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """Return the sum of attention and padding mask, broadcastable to ``[N, heads, L, S]``; added tokens are never masked."""
    n, heads, rows, tokens = *query.shape[:3], key.shape[2]
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if given["is_causal"]:
        if mask is None:
            ask = "give nn.Transformer.generate_square_subsequent_mask(length)"
            raise BitwrightError(f"nn.MultiheadAttention: is_causal without attn_mask; {ask}")
        if padding is None and not given["need_weights"]:  # here torch takes the hint and leaves the mask unread
            return blocked(torch.ones(rows, tokens, dtype=torch.bool, device=query.device).triu(1), query.dtype)
    source = given["key"].shape[0]
    if mask is not None:
        if tuple(mask.shape) not in ((rows, source), (n * heads, rows, source)):
            found = f"attn_mask has the shape {tuple(mask.shape)}"
            raise BitwrightError(f"nn.MultiheadAttention: {found}; give {(rows, source)} or {(n * heads, rows, source)}")
        mask = _additive(mask, query).view(-1, heads if mask.dim() == 3 else 1, rows, source)
    if padding is not None:
        padding = _additive(padding, query).view(n, 1, 1, source)
        mask = padding if mask is None else mask + padding
    return None if mask is None else F.pad(mask, (0, tokens - source))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    return blocked(mask, like.dtype) if mask.dtype == torch.bool else mask
