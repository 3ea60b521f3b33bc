"""FusedInferAttentionScore and AttentionUpdate, as their manuals describe them.

Manual sections are quoted by what they are about; "PFA" and "IFA" are the two kernels behind the operator
(PromptFlashAttention for more than one query row, IncreFlashAttention for one). Where the manual gives no formula, the
one of CANN's host code is taken (ops-transformer, ``attention/prompt_flash_attention/op_host/
prompt_flash_attention_tiling.cpp``: ``GetPreNextTokensLeftUp`` and the checks after "sparsePreTokens").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.ascend.ge.node import BOOL, FLOATING, Call, Invalid

COMPRESSED = 2048
"""Side of the mask that sparse modes 2, 3 and 4 need."""
DTYPES = (torch.float16, torch.bfloat16)
_MASK_DTYPES = (*BOOL, torch.int8, torch.uint8)
_LAYOUTS = ("BNSD", "BSND", "BSH", "BNSD_BSND")
_DEFAULT, _ALL, _LEFT_UP, _RIGHT_DOWN, _BAND = range(5)
_UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class _Problem:
    """Query, key and value in BNSD order with what the attributes say; lengths are per batch."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_lengths: list[int]
    kv_lengths: list[int]
    mode: int
    pre: int
    next: int


def fused_infer_attention_score(call: Call) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, masked) @ value, query heads grouped over key heads (GQA), and its log-sum-exp.

    The log-sum-exp is float32, natural, of shape (B, N, Q_S, 1) in every layout, and [0] where ``softmax_lse_flag`` is
    off. A row that the mode, the tokens or the lengths leave without keys has output 0 and log-sum-exp +inf, which is
    what the kernel initialises them to. Scores and sums are computed in float64 here; the NPU rounds probabilities to
    the input dtype before the second product, which the manual does not describe.

    Refused because not implemented: tensor lists, quantisation, paged attention, left padding, shared prefixes, rope
    inputs, position shifts (``pse_shift``), layouts other than BNSD, BSND, BSH and BNSD_BSND.
    """
    layout = call.text("input_layout", "BSH")
    call.require(layout in _LAYOUTS, f"input_layout {layout!r} is not implemented")
    call.only(block_size=0, antiquant_mode=0, key_antiquant_mode=0, value_antiquant_mode=0)
    call.only(query_quant_mode=0, pse_type=0, out_dtype=0)
    query, key, value = _operands(call, layout)
    call.require(key.numel() > 0, "key and value are empty; the log-sum-exp of that is not documented")
    b, _, q_len, _ = query.shape
    kv_len = key.shape[2]
    precise = call.integer("inner_precise", 1)
    mode, pre, next_ = (call.integer(*named) for named in _TOKENS)
    call.require(_DEFAULT <= mode <= _BAND, f"sparse_mode must be 0, 1, 2, 3 or 4, got {mode}")
    mask = call.optional("atten_mask", _MASK_DTYPES)
    q_lengths = _lengths(call, "actual_seq_lengths", b, q_len)
    kv_lengths = _lengths(call, "actual_seq_lengths_kv", b, kv_len)
    if q_len == 1:
        call.require(layout != "BNSD_BSND", "input_layout BNSD_BSND needs more than one query row")
        call.require(precise in (0, 1), f"inner_precise must be 0 or 1 for one query row, got {precise}")
        call.require(kv_len <= 262144, f"at most 262144 keys for one query row, got {kv_len}")
        hidden = _one_row_mask(call, mask, b, kv_len)
        # sparse_mode, pre_tokens, next_tokens and actual_seq_lengths have no effect.
        problem = _Problem(query, key, value, [1] * b, kv_lengths, _ALL, _UNLIMITED, _UNLIMITED)
    else:
        call.require(precise in (0, 1, 2, 3), f"inner_precise must be 0, 1, 2 or 3, got {precise}")
        hidden = _mask(call, mask, mode, b, q_len, kv_len)
        if mode == _DEFAULT and mask is None:
            pre = next_ = _UNLIMITED
        problem = _Problem(query, key, value, q_lengths, kv_lengths, mode, pre, next_)
        _check_tokens(call, problem)
    inside = _inside(problem)
    visible = inside if hidden is None else inside & ~hidden
    if q_len > 1 and hidden is not None and precise in (0, 1):
        lost = inside.any(-1) & ~visible.any(-1)
        call.require(not bool(lost.any()), "atten_mask hides a whole row, which needs inner_precise 2 or 3")
    out, lse = _attend(problem, visible, call.real("scale", 1.0))
    if layout in ("BSND", "BNSD_BSND"):
        out = out.transpose(1, 2).contiguous()
    elif layout == "BSH":
        out = out.transpose(1, 2).reshape(b, q_len, -1)
    return out, lse if call.flag("softmax_lse_flag", False) else torch.zeros(1)


_TOKENS = (("sparse_mode", 0), ("pre_tokens", _UNLIMITED), ("next_tokens", _UNLIMITED))


def _operands(call: Call, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (B, N, S, D), checked against the manual's limits."""
    query = call.tensor("query", DTYPES)
    keys, values = call.dynamic("key", (query.dtype,)), call.dynamic("value", (query.dtype,))
    call.require(len(keys) == 1 and len(values) == 1, "tensor lists for key and value are not implemented")
    key, value = keys[0], values[0]
    rank = 3 if layout == "BSH" else 4
    call.require(query.dim() == key.dim() == rank, f"{layout} needs rank {rank}, got {query.dim()} and {key.dim()}")
    same = key.shape == value.shape
    call.require(same, f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}")
    heads, kv_heads = call.integer("num_heads"), call.integer("num_key_value_heads", 0)
    call.require(heads > 0 and kv_heads >= 0, f"num_heads is {heads}, num_key_value_heads {kv_heads}")
    kv_heads = kv_heads or heads
    call.require(heads % kv_heads == 0, f"num_key_value_heads {kv_heads} must divide num_heads {heads}")
    call.require(heads // kv_heads <= 64, f"at most 64 query heads to a key head, got {heads // kv_heads}")
    if layout == "BSH":
        sizes = (query.shape[2], key.shape[2])
        whole = sizes[0] % heads == 0 and sizes[1] % kv_heads == 0
        call.require(whole, f"hidden sizes {sizes} are no multiples of {heads} and {kv_heads} heads")
        query, key, value = (
            x.reshape(*x.shape[:2], count, -1) for x, count in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
    if layout in ("BSH", "BSND"):
        for x in (query, key):
            wide = x.shape[2] * x.shape[3]
            call.require(wide < 65535, f"{layout} needs heads * head dim below 65535, got {wide}")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    b, n, q_len, dim = query.shape
    call.require(n == heads, f"num_heads is {heads}, query has {n}")
    call.require(key.shape[1] == kv_heads, f"num_key_value_heads is {kv_heads}, key has {key.shape[1]}")
    call.require(key.shape[0] == b and key.shape[3] == dim, f"query {tuple(query.shape)}, key {tuple(key.shape)}")
    call.require(b <= 65536 and n <= 256, f"at most batch 65536 and 256 heads, got {b} and {n}")
    call.require(dim <= 512, f"head dim must be at most 512, got {dim}")
    # The manual asks for this of more than one row; for one row it says nothing, so it is asked there too.
    call.require(dim % 16 == 0, f"head dim must be a multiple of 16, got {dim}")
    call.require(max(q_len, key.shape[2]) <= 20971520, "sequences may have at most 20971520 tokens")
    return query, key, value


def _lengths(call: Call, name: str, batch: int, longest: int) -> list[int]:
    """Valid lengths per sequence: one for all, or at least one each, of which the first B count."""
    if call.optional(name, (torch.int64,)) is None:
        return [longest] * batch
    lengths = call.numbers(name)
    call.require(len(lengths) == 1 or len(lengths) >= batch, f"{name} has {len(lengths)} entries for batch {batch}")
    lengths = lengths * batch if len(lengths) == 1 else lengths[:batch]
    call.require(all(0 <= x <= longest for x in lengths), f"{name} must be from 0 to {longest}, got {lengths}")
    return lengths


def _one_row_mask(call: Call, mask: Tensor | None, batch: int, kv_len: int) -> Tensor | None:
    """IFA: a mask over the keys of each sequence, (B, KV_S), (B, 1, KV_S) or (B, 1, 1, KV_S), KV_S possibly rounded up.

    The compressed mask is none. IFA ignores the sparse mode of one row, so whoever passes the compressed mask with it
    expects something else than what would be computed: refused.
    """
    if mask is None:
        return None
    keys = mask.shape[-1] in _rounded(kv_len)
    fits = 2 <= mask.dim() <= 4 and mask.shape[0] == batch and keys and mask.numel() == batch * mask.shape[-1]
    call.require(
        fits,
        f"one query row: sparse_mode is ignored, and atten_mask must be (B, KV_S) = ({batch}, {kv_len}), "
        f"got {tuple(mask.shape)}",
    )
    return mask.reshape(batch, 1, -1)[:, :, :kv_len].bool()


def _mask(call: Call, mask: Tensor | None, mode: int, batch: int, q_len: int, kv_len: int) -> Tensor | None:
    """PFA: what atten_mask itself hides, (1 or B, Q_S, KV_S), or None where the mode alone decides.

    Modes 2, 3 and 4 need the compressed mask, and the manual leaves it to the caller that it is the strict upper
    triangle; modes 0 and 1 take a whole mask, whose sizes may be rounded up to 16 or 32.
    """
    if mode in (_LEFT_UP, _RIGHT_DOWN, _BAND):
        if mask is None:
            call.fail(f"sparse_mode {mode} needs atten_mask")
        side = (COMPRESSED, COMPRESSED)
        shapes = (side, (1, *side), (1, 1, *side))
        call.require(
            tuple(mask.shape) in shapes, f"sparse_mode {mode} needs atten_mask {side}, got {tuple(mask.shape)}"
        )
        triangle = torch.ones(side, dtype=torch.bool).triu(1)
        same = torch.equal(mask.reshape(side).bool(), triangle)
        call.require(same, f"sparse_mode {mode} needs the strict upper triangle in atten_mask")
        return None
    if mask is None:
        call.require(mode != _ALL, "sparse_mode 1 needs atten_mask")
        return None
    rows, keys = mask.shape[-2:] if mask.dim() >= 2 else (0, 0)
    leading = tuple(mask.shape[:-2])
    fits = leading in ((), (1,), (1, 1), (batch, 1)) and rows in _rounded(q_len) and keys in _rounded(kv_len)
    call.require(
        fits, f"atten_mask must be (Q_S, KV_S), (1, Q_S, KV_S) or (1 or B, 1, Q_S, KV_S), got {tuple(mask.shape)}"
    )
    whole = mask.reshape(-1, rows, keys)
    return whole[:, :q_len, :kv_len].bool()


def _rounded(size: int) -> set[int]:
    return {size, -(-size // 16) * 16, -(-size // 32) * 32}


def _check_tokens(call: Call, problem: _Problem) -> None:
    """The limits of pre_tokens and next_tokens in the modes that read them (host code, quoted above)."""
    mode, pre, next_ = problem.mode, problem.pre, problem.next
    if mode not in (_DEFAULT, _BAND):
        return
    call.require(pre >= 0 or next_ >= 0, f"pre_tokens {pre} and next_tokens {next_} are both negative")
    call.require(pre + next_ >= 0, f"pre_tokens {pre} + next_tokens {next_} is negative: the band is empty")
    for q_len, kv_len in zip(problem.q_lengths, problem.kv_lengths, strict=True):
        most_next, most_pre = (kv_len, q_len) if mode == _BAND else (q_len, kv_len)
        call.require(-next_ < most_next or next_ >= 0, f"next_tokens {next_} leaves nothing of {most_next}")
        call.require(-pre < most_pre or pre >= 0, f"pre_tokens {pre} leaves nothing of {most_pre}")


def _inside(problem: _Problem) -> Tensor:
    """(B, Q_S, KV_S): what mode, tokens and lengths let a row see, before atten_mask.

    With d = j - i: mode 0 (counted from the top left) -pre <= d <= next; mode 1 all; mode 2 d <= 0; mode 3
    d <= shift; mode 4 shift - pre <= d <= shift + next, where shift = KV_S - Q_S of the valid lengths moves the origin
    to the bottom right.
    """
    rows, keys = problem.query.shape[2], problem.key.shape[2]
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    layers = []
    for q_len, kv_len in zip(problem.q_lengths, problem.kv_lengths, strict=True):
        shift = kv_len - q_len
        low, high = {
            _DEFAULT: (-problem.pre, problem.next),
            _ALL: (-_UNLIMITED, _UNLIMITED),
            _LEFT_UP: (-_UNLIMITED, 0),
            _RIGHT_DOWN: (-_UNLIMITED, shift),
            _BAND: (shift - problem.pre, shift + problem.next),
        }[problem.mode]
        layers.append((j - i >= low) & (j - i <= high) & (i < q_len) & (j < kv_len))
    return torch.stack(layers)


def _attend(problem: _Problem, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = problem.query, problem.key, problem.value
    b, n, q_len, dim = query.shape
    grouped = query.double().reshape(b, key.shape[1], -1, q_len, dim)
    scores = grouped @ key.double()[:, :, None].transpose(-1, -2) * scale
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    alive = visible.any(-1)[:, None, None, :, None]
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    out = (weights @ value.double()[:, :, None]).reshape(b, n, q_len, dim)
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(~alive, float("inf"))
    return out.to(query.dtype), lse.reshape(b, n, q_len, 1).float()


def attention_update(call: Call) -> tuple[Tensor, Tensor | Invalid]:
    """AttentionUpdate: attention over ``sp`` separate sets of keys, merged.

    ``lse_m = log(sum_i exp(lse_i))``, ``output = sum_i go_i * exp(lse_i - lse_m)``; lse_i (B*S*N,) float32, go_i
    (B*S*N, D) of one dtype, sp from 1 to 16, D a multiple of 8 from 8 to 512. ``lse_m`` is invalid with update_type 0.
    The formula gives no number for an lse of +inf or NaN, nor for a row whose every lse is -inf: refused.
    """
    update, parts = call.integer("update_type"), call.integer("sp")
    lses, outs = call.dynamic("lse", (torch.float32,)), call.dynamic("go", FLOATING[:3])
    call.require(update in (0, 1), f"update_type must be 0 or 1, got {update}")
    call.require(1 <= parts <= 16, f"sp must be from 1 to 16, got {parts}")
    call.require(len(lses) == len(outs) == parts, f"sp is {parts}, with {len(lses)} lse and {len(outs)} go")
    rows, dim = outs[0].shape if outs[0].dim() == 2 else (-1, -1)
    for lse, out in zip(lses, outs, strict=True):
        fits = lse.shape == (rows,) and out.shape == (rows, dim) and out.dtype == outs[0].dtype
        call.require(fits, f"lse {tuple(lse.shape)} and go {tuple(out.shape)} {out.dtype} must be (R,) and (R, D)")
    call.require(8 <= dim <= 512 and dim % 8 == 0, f"head dim must be a multiple of 8 from 8 to 512, got {dim}")
    each = torch.stack(lses).double()
    call.require(not bool((each.isnan() | (each == float("inf"))).any()), "an lse is +inf or NaN")
    merged = torch.logsumexp(each, 0)
    call.require(not bool(merged.isinf().any()), "a row has no finite lse")
    weights = torch.exp(each - merged)
    out = (torch.stack(outs).double() * weights[:, :, None]).sum(0).to(outs[0].dtype)
    return out, merged.float() if update == 1 else Invalid("lse_m is computed with update_type 1 alone")


OPERATORS = {"FusedInferAttentionScore": fused_infer_attention_score, "AttentionUpdate": attention_update}
"""GE type -> function of a :class:`~tests.support.ascend.ge.node.Call` that returns the outputs."""
