"""Kimi Delta Attention (KDA) on the CPU: definition and fast chunked form.

Shapes: B batch, T time, H heads, K and V head dims of keys and values; time cut into N chunks of C
tokens, M = N * B * H chunks side by side, L = log2(C) levels within a chunk.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

CHUNK = 16  # the best compromise over head dims: 8 is as fast at 32, 32 slightly faster at 128
NORM_EPS = 1e-6
BLOCK_ELEMENTS = 1 << 16  # of one temporary of _Scores: several must fit an L2 cache of 1 MiB


def recurrent_kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition of KDA, one token after the other. Slow; for tests.

    Per head, with state S ``[K, V]``, decays exp(g_t) ``[K]`` and a step size beta_t::

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t / sqrt(K)

    Args, returns: as :func:`chunk_kda`.
    Source: Kimi Linear, arXiv 2510.26692, eq. 1; fla ``ops/kda/naive.py``.
    """
    dtype, work = query.dtype, torch.promote_types(query.dtype, torch.float32)
    q, k, v, g, beta = (x.to(work) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for x in (q, k))
    q = q / q.shape[-1] ** 0.5
    b, t, h, kd = k.shape
    state = k.new_zeros(b, h, kd, v.shape[-1]) if initial_state is None else initial_state.to(work)
    outputs = []
    for i in range(t):
        state = state * g[:, i, ..., None].exp()
        error = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], error * beta[:, i, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state))
    return torch.stack(outputs, 1).to(dtype), state if output_final_state else None


def chunk_kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = CHUNK,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """KDA over whole sequences, for transformers' ``chunk_kimi_delta_attention``.

    Args:
        query, key: ``[B, T, H, K]``, T >= 1.
        value: ``[B, T, H, V]``.
        g: ``[B, T, H, K]``, log decay of each step, finite and <= 0.
        beta: ``[B, T, H]``, step size.
        chunk_size: a power of two >= 2; changes the result only by rounding.
        initial_state: ``[B, H, K, V]``, or None for zeros.
        output_final_state: return the state after the last token too.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(|x|^2 + 1e-6) first.
        kwargs: ignored: callers pass all that fla's kernel takes.

    Returns: output ``[B, T, H, V]`` in query's dtype; final state ``[B, H, K, V]`` or None.
    Arithmetic and state are float32, also under autocast, or float64 for float64 queries.
    Differentiable once; the same inputs give the same bits.

    Raises:
        ValueError: another chunk_size, or packed sequences (cu_seqlens, seq_idx).

    Source: Kimi Linear, arXiv 2510.26692, section 3 (chunkwise form); fla ``ops/kda/naive.py``.
    """
    if kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None:
        raise ValueError("chunk_kda cannot keep packed sequences apart (cu_seqlens, seq_idx)")
    if chunk_size < 2 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two >= 2, not {chunk_size}")
    work = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        inputs = [x.to(work) for x in (query, key, value, g, beta[..., None])]
        state = None if initial_state is None else initial_state.to(work)
        q, k, v, g, beta = inputs
        out, state = _chunked(q, k, v, g, beta, state, chunk_size, use_qk_l2norm_in_kernel)
    return out.to(query.dtype), state if output_final_state else None


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, c: int, l2: bool
) -> tuple[Tensor, Tensor]:
    """All chunks side by side, then a scan over them. Per chunk, G being the running sum of g::

    A = tril(beta_i sum_d k_i k_j exp(G_i - G_j), -1),   P = tril(sum_d q_i k_j exp(G_i - G_j))
    W = (I + A)^-1 diag(beta) (V - (K exp(G)) S)         what each token writes under its key
    O = (Q exp(G)) S + P W
    S <- diag(exp(G_C)) S + (K exp(G_C - G))^T W
    """
    b, t, h, kd = k.shape
    n, vd = -(-t // c), v.shape[-1]

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, D] -> [M, C, D]; zeros at the end change nothing
        x = F.pad(x, (0, 0, 0, 0, 0, n * c - t)) if n * c > t else x
        return x.reshape(b, n, c, h, -1).permute(1, 0, 3, 2, 4).reshape(n * b * h, c, -1)

    q, k, v, g, beta = map(chunks, (q, k, v, g, beta))
    if l2:
        q, k = (x * (torch.linalg.vecdot(x, x)[..., None] + NORM_EPS).rsqrt() for x in (q, k))
    q = q * kd**-0.5
    sums, masks = _plan(c, q.dtype, q.device)
    decay_in, decay_out = ((s @ g).exp() for s in sums[-2:])  # [M, C, K]: exp(G_i), exp(G_C - G_i)
    kk, qk = _Scores.apply(q, k, g, sums[:-2], masks)
    solve = _UnitLowerInverse.apply(kk * beta, masks) * beta.mT  # [M, C, C]
    before = q.new_zeros(b * h, kd, vd) if state is None else state.reshape(b * h, kd, vd)
    steps = (solve @ v, solve @ (k * decay_in), k * decay_out, decay_in[:, -1, :, None])
    writes, states, after = cast(
        "tuple[Tensor, Tensor, Tensor]",
        _Scan.apply(*(x.unflatten(0, (n, b * h)) for x in steps), before),
    )
    out = torch.baddbmm((q * decay_in) @ states.flatten(0, 1), qk, writes.flatten(0, 1))
    out = out.view(n, b, h, c, vd).permute(1, 0, 3, 2, 4).reshape(b, n * c, h, vd)[:, :t]
    return out.contiguous(), after.view(b, h, kd, vd)


@cache
def _plan(chunk: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constants of a chunk: which steps each decay sums, which pairs each level serves.

    Level l cuts the chunk into blocks of C / 2^l and pairs the right half of a block (rows i) with
    its left half (columns j): each pair i > j belongs to exactly one level. The pair's decay,
    exp(g_{j+1} + ... + g_i), is a product of two factors that meet at the middle of the block: no
    exponent is above 0, and none is a difference of large sums.

    Returns: sums ``[L + 2, C, C]``, 0/1: the steps between i and the middle of its block, at levels
    0..L-1; those from the chunk's start up to i; those after i. masks ``[L, C, C]``, 0/1.
    """
    with torch.inference_mode(False):  # else a first call in inference mode would break training
        col = torch.arange(chunk, device=device)
        row = col[:, None]
        sums, masks = [], []
        for size in (chunk >> level for level in range(chunk.bit_length() - 1)):
            mid = row // size * size + size // 2
            right = row >= mid
            sums.append(torch.where(right, (mid <= col) & (col <= row), (row < col) & (col < mid)))
            masks.append(right & (row // size == col // size) & (col < mid))
        return torch.stack([*sums, col <= row, col > row]).to(dtype), torch.stack(masks).to(dtype)


class _Scores(torch.autograd.Function):
    """q, k, g ``[M, C, K]`` -> ``[M, C, C]``: decayed products of keys (i > j) and q, k (i >= j).

    Works through M in blocks that stay in cache. Backward computes the scaled q and k anew: they
    are L times the inputs' size, and fetching them from memory costs more than computing them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor, sums: Tensor, masks: Tensor):
        ctx.save_for_backward(q, k, g, sums, masks)
        kk, qk = q.new_empty(2, *q.shape[:2], q.shape[1])
        for at in _Scores.blocks(q, masks):
            _, k_scaled, q_scaled = _Scores.scaled(q[at], k[at], g[at], sums)
            for x, scores in ((k_scaled, kk), (q_scaled, qk)):
                torch.sum((x @ k_scaled.mT).mul_(masks), 1, out=scores[at])
        qk.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, k))
        return kk, qk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kk: Tensor, d_qk: Tensor):
        q, k, g, sums, masks = ctx.saved_tensors
        d_q, d_k, d_g = (torch.empty_like(x) for x in (q, k, g))
        d_kk = d_kk.tril(-1)
        d_kk = d_kk + d_kk.mT  # a key is row in some pairs and column in others, never at one level
        both = masks + masks.mT
        sums_t = sums.flatten(0, 1).T.contiguous()
        for at in _Scores.blocks(q, masks):
            decay, k_scaled, q_scaled = _Scores.scaled(q[at], k[at], g[at], sums)
            from_kk, from_qk = d_kk[at, None] * both, d_qk[at, None] * masks
            d_ks = (from_kk @ k_scaled).add_(from_qk.mT @ q_scaled).mul_(decay)
            d_qs = (from_qk @ k_scaled).mul_(decay)
            torch.sum(d_ks, 1, out=d_k[at])
            torch.sum(d_qs, 1, out=d_q[at])
            d_exponent = d_ks.mul_(k[at, None]).addcmul_(d_qs, q[at, None])
            torch.matmul(sums_t, d_exponent.flatten(1, 2), out=d_g[at])
        diagonal = d_qk.diagonal(dim1=1, dim2=2)[..., None]
        return d_q.addcmul_(diagonal, k), d_k.addcmul_(diagonal, q), d_g, None, None

    @staticmethod
    def blocks(q: Tensor, masks: Tensor) -> list[slice]:
        step = max(1, BLOCK_ELEMENTS // (len(masks) * q[0].numel()))
        return [slice(start, start + step) for start in range(0, len(q), step)]

    @staticmethod
    def scaled(q: Tensor, k: Tensor, g: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decay between each token and the middle of its block; k, q times it: ``[m, L, C, K]``."""
        decay = (sums.flatten(0, 1) @ g).exp_().unflatten(1, sums.shape[:2])
        return decay, decay * k[:, None], decay * q[:, None]


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower A ``[M, C, C]``; level by level the solved blocks double.

    As stable as forward substitution. The product (I - A)(I + A^2)(I + A^4).. is not: where keys
    repeat, its terms grow like binomials and cancel.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, masks: Tensor) -> Tensor:
        inverse = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - a * masks[-1]
        for mask in masks[:-1].flip(0):
            inverse = torch.baddbmm(inverse, inverse @ (a * mask), inverse, alpha=-1)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        transposed = ctx.saved_tensors[0].mT
        return (transposed @ grad @ transposed).neg_(), None


class _Scan(torch.autograd.Function):
    """writes_n = u_n - w_n S_n;  S_{n+1} = decay_n S_n + k_n^T writes_n.

    u ``[N, BH, C, V]``, w, k ``[N, BH, C, K]``, decay ``[N, BH, K, 1]``, S_0 ``[BH, K, V]`` ->
    all writes, S_0..S_{N-1}, S_N.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, k: Tensor, decay: Tensor, state: Tensor):
        writes, states = torch.empty_like(u), state.new_empty(len(u) + 1, *state.shape)
        states[0] = state
        for n in range(len(u)):
            torch.baddbmm(u[n], w[n], states[n], alpha=-1, out=writes[n])
            torch.mul(states[n], decay[n], out=states[n + 1]).baddbmm_(k[n].mT, writes[n])
        ctx.save_for_backward(w, k, decay, states, writes)
        return writes, states[:-1], states[-1].clone()  # a view would keep all states in memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_writes: Tensor, from_states: Tensor, from_last: Tensor):
        w, k, decay, states, writes = ctx.saved_tensors
        d_writes, d_states = torch.empty_like(writes), torch.empty_like(states)
        d_states[-1] = from_last
        for n in reversed(range(len(w))):
            torch.baddbmm(from_writes[n], k[n], d_states[n + 1], out=d_writes[n])
            torch.addcmul(from_states[n], d_states[n + 1], decay[n], out=d_states[n])
            d_states[n].baddbmm_(w[n].mT, d_writes[n], alpha=-1)
        d_w, d_k = (d_writes @ states[:-1].mT).neg_(), writes @ d_states[1:].mT
        d_decay = torch.linalg.vecdot(d_states[1:], states[:-1])[..., None]
        return d_writes, d_w, d_k, d_decay, d_states[0]


def causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Depthwise causal convolution, for transformers' ``causal_conv1d_fn``.

    Args: hidden_states ``[B, D, T]``, best the transpose of a contiguous ``[B, T, D]``; weight
    ``[D, W]``; bias ``[D]``; activation: a name in ``ACT2FN``; kwargs: ignored.

    Returns: ``[B, D, T]`` in hidden_states' dtype, computed in at least float32. Differentiable
    once.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    out = _CausalConv.apply(hidden_states.mT.to(work), weight.to(work))
    out = out if bias is None else out + bias
    out = out if activation is None else kimi.ACT2FN[activation](out)
    if out.requires_grad:  # the layer's slicing returns the gradient laid out as [B, D, T]: slow
        out.register_hook(lambda grad: None if grad is None else grad.contiguous())
    return out.mT.to(hidden_states.dtype)


class _CausalConv(torch.autograd.Function):
    """x ``[B, T, D]``, weight ``[D, W]`` -> sum_j weight_{W-1-j} x_{t-j}.

    Works through B in blocks that stay in cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.mT.flip(0).contiguous()  # [W, D]: tap j weighs x_{t-j}
        out = torch.empty_like(x)
        rows = _CausalConv.rows(x)
        for x_b, out_b in zip(x.split(rows), out.split(rows), strict=True):
            torch.mul(x_b, taps[0], out=out_b)
            for j in range(1, len(taps)):
                out_b[:, j:].addcmul_(x_b[:, :-j], taps[j])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight = ctx.saved_tensors
        taps = weight.mT.flip(0).contiguous()
        d_x, d_taps = torch.empty_like(x), torch.zeros_like(taps)
        rows = _CausalConv.rows(x)
        for grad_b, d_b in zip(grad.split(rows), d_x.split(rows), strict=True):
            torch.mul(grad_b, taps[0], out=d_b)
            for j in range(1, len(taps)):
                d_b[:, :-j].addcmul_(grad_b[:, j:], taps[j])
        if not ctx.needs_input_grad[1]:
            return d_x, None
        for x_b, grad_b in zip(x, grad, strict=True):
            d_taps[0] += (grad_b * x_b).sum(0)
            for j in range(1, len(taps)):
                d_taps[j] += (grad_b[j:] * x_b[:-j]).sum(0)
        return d_x, d_taps.flip(0).mT

    @staticmethod
    def rows(x: Tensor) -> int:
        """How many rows of B a block has."""
        return max(1, BLOCK_ELEMENTS // max(1, x[0].numel()))
