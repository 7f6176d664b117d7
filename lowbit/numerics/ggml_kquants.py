"""Encoders of ggml's super-block types Q2_K .. Q6_K, and the scale searches that its 32-element types share.

A super-block is 256 consecutive weights in 16 or 8 groups. Each group has an integer scale (and an integer minimum), and the super-block
one float16 that multiplies the scales (and one that multiplies the minima):

    affine     Q2_K Q4_K Q5_K   w = d * ls[g] * code - dmin * lm[g]     code in 0 .. 2^b - 1, ls and lm in 0 .. 15 or 63
    symmetric  Q3_K Q6_K        w = d * ls[g] * code                    code in -2^(b-1) .. 2^(b-1) - 1, ls signed, 6 or 8 bits

The searches over trial ranges are those of ggml (ggml/src/ggml-quants.c: make_qx_quants, make_qkx2_quants, make_qkx3_quants,
make_qp_quants), over a wider set. What follows differs from it: each group's integer scale is weighted by the error that a change of
it causes, and codes, integer scales and float16s are refitted once by least squares. Codes round half to even.

Blocks are the last dimension here ([elements of a group, groups]), so that every sum over a group is a vectorised sum over rows. On a CPU the same searches run in
C++ where that was built (csrc/encode.inc); this is what they mean, what other devices run, and the oracle of their tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError

SUPER_BLOCK = 256
TOO_LARGE = "weights are too large for the float16 scales of ggml's blocks, which end at 65504."

# Below this share of what its terms have, a least-squares determinant is rounding noise.
SINGULAR = 1e-5
# Nothing below it matters to a float16, and its reciprocal is far from overflowing.
TINY = 1e-30
HALF_MAX = torch.finfo(torch.float16).max

# Trial ranges: a group's range is laid over that many code steps more or fewer than it has; more cuts the largest values off, which pays
# where importance is uneven. ggml tries -0.9 to 0.9. The refit closes most of the gap between trials, so the types without one try more.
NEAR_TRIALS = tuple(0.2 * step for step in range(-4, 5))
WIDE_TRIALS = tuple(0.3 * step for step in range(-3, 16))
FINE_TRIALS = tuple(0.15 * step for step in range(-6, 31))


@dataclass(frozen=True)
class KQuant:
    """The numbers of one super-block type: group length, code range, integer scale range, and how errors are weighted.

    low, high: codes. scale_low, scale_high: integer scales (and minima). spread: the weight of x under an importance q is
    q * sqrt(spread * mean(x^2) + x^2), or q alone when None.
    """

    group: int
    low: int
    high: int
    scale_low: int
    scale_high: int
    spread: float | None


KQUANTS = {
    "q2_k": KQuant(group=16, low=0, high=3, scale_low=0, scale_high=15, spread=1.0),
    "q3_k": KQuant(group=16, low=-4, high=3, scale_low=-32, scale_high=31, spread=2.0),
    "q4_k": KQuant(group=32, low=0, high=15, scale_low=0, scale_high=63, spread=2.0),
    "q5_k": KQuant(group=32, low=0, high=31, scale_low=0, scale_high=63, spread=2.0),
    "q6_k": KQuant(group=16, low=-32, high=31, scale_low=-128, scale_high=127, spread=None),
}


def encode_super_blocks(X: Tensor, type_name: str, importance: Tensor | None) -> Tensor:
    """Encode super-blocks.

    X: float32 [super_blocks, 256], finite. importance: float32 [super_blocks, 256], positive, or None.
    Returns uint8 [super_blocks, block_bytes]. Raises FormatError when a float16 overflows.
    """
    kind = KQUANTS[type_name]
    groups = (X.numel() // kind.group, kind.group)
    W = error_weights(X, type_name, importance).view(groups).t().contiguous()
    X = X.reshape(groups).t().contiguous()
    trials = NEAR_TRIALS if importance is None else WIDE_TRIALS
    fitted = _fit_affine(X, W, kind, trials) if kind.low == 0 else _fit_symmetric(X, W, kind, trials)
    return pack_super_blocks(type_name, *fitted)


def pack_super_blocks(type_name: str, codes: Tensor, *header: Tensor) -> Tensor:
    """Blocks of codes uint8 [super_blocks, 256] from 0 up, the integers of each group (ls; and lm) and the floats (d; and dmin)."""
    return _PACK[type_name](codes, *header)


def error_weights(X: Tensor, type_name: str, importance: Tensor | None) -> Tensor:
    """The weight of each squared error; X and importance as in encode_super_blocks, the result [super_blocks, 256].

    Those of ggml, but for Q3_K and Q6_K without importance: its x^2 alone leaves the small weights with more error than they need.
    """
    kind = KQUANTS[type_name]
    if importance is not None:
        if kind.spread is None:
            return importance.expand_as(X).contiguous()
        square = X.square()
        return square.add_(square.mean(1, keepdim=True), alpha=kind.spread).sqrt_().mul_(importance)
    if kind.low < 0:
        square = X.square()
        return square.add_(square.mean(1, keepdim=True))
    if type_name == "q2_k":
        return X.abs()
    groups = X.view(-1, kind.group)
    return groups.abs().add_(groups.square().mean(1, keepdim=True).sqrt_()).view_as(X)


def _fit_affine(X: Tensor, W: Tensor, kind: KQuant, trials: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Codes [super_blocks, 256], ls and lm [super_blocks, groups], d and dmin float16 [super_blocks, 1]; X, W [group, all groups]."""
    per = SUPER_BLOCK // kind.group
    scratch = X.new_empty(4, *X.shape)
    scale, low = search_affine(X, W, levels=kind.high, trials=trials, scratch=scratch)
    _affine_codes(X, scale, low.neg(), kind.high, scratch)
    wl, wl2, _, _, _ = (t.view(-1, per) for t in _moments(W, scratch))
    sw = W.sum(0).view(-1, per)
    scale, low = scale.view(-1, per), low.view(-1, per)
    d, ls = _search_integers(scale, wl2, kind)
    low = low + (scale - d * ls) * wl / sw.clamp_min(TINY)
    dmin, lm = _search_integers(low.clamp_max_(0).neg_(), sw, kind)

    def error_of(ls: Tensor, lm: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, list[Tensor]]:
        _affine_codes(X, (d * ls).view(-1), (dmin * lm).view(-1), kind.high, scratch)
        *moments, error = (t.view(-1, per) for t in _moments(W, scratch))
        return error.sum(1, keepdim=True), moments

    found = ls, lm, d.half().float(), dmin.half().float()
    error, moments = error_of(*found)
    refit = _refit_affine(*found, sw, *moments, top=kind.scale_high)
    _select_((error_of(*refit)[0] < error).float(), *zip(found, refit, strict=True))
    ls, lm, d, dmin = found
    L = _affine_codes(X, (d * ls).view(-1), (dmin * lm).view(-1), kind.high, scratch)
    return _as_bytes(L), ls.to(torch.uint8), lm.to(torch.uint8), as_half(d), as_half(dmin)


def _refit_affine(
    ls: Tensor, lm: Tensor, d: Tensor, dmin: Tensor, sw: Tensor, wl: Tensor, wl2: Tensor, wr: Tensor, wrl: Tensor, *, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One least-squares step with the codes fixed: first the integers of each group, then the two floats of the super-block.

    All [super_blocks, groups] but d, dmin [super_blocks, 1]. r is what is left of x; moving s by a and m by b leaves r - a code + b.
    """
    det = torch.maximum(sw * wl2 - wl * wl, SINGULAR * sw * wl2 + TINY)
    new_ls = torch.nan_to_num(ls + (sw * wrl - wr * wl) / (det * d), 0, 0, 0).round_().clamp_(0, top)
    a = d * (new_ls - ls)
    new_lm = torch.nan_to_num(lm + (a * wl - wr) / (sw * dmin), 0, 0, 0).round_().clamp_(0, top)
    b = dmin * (new_lm - lm)
    wrl = wrl - a * wl2 + b * wl
    wr = wr - a * wl + b * sw

    ss = (new_ls * new_ls * wl2).sum(1, keepdim=True)
    sm = (new_ls * new_lm * wl).sum(1, keepdim=True)
    mm = (new_lm * new_lm * sw).sum(1, keepdim=True)
    by_d = (new_ls * wrl).sum(1, keepdim=True)
    by_dmin = (new_lm * wr).sum(1, keepdim=True).neg_()
    det = torch.maximum(ss * mm - sm * sm, SINGULAR * ss * mm + TINY)
    new_d = d + (mm * by_d + sm * by_dmin) / det
    new_dmin = dmin + (sm * by_d + ss * by_dmin) / det
    return new_ls, new_lm, new_d.clamp_(0, HALF_MAX).half().float(), new_dmin.clamp_(0, HALF_MAX).half().float()


def _fit_symmetric(X: Tensor, W: Tensor, kind: KQuant, trials: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Codes [super_blocks, 256] from 0 up, ls from 0 up [super_blocks, groups], d float16 [super_blocks, 1]; X, W [group, all groups]."""
    per = SUPER_BLOCK // kind.group
    scratch = X.new_empty(4, *X.shape)
    scale = search_scale(X, W, low=kind.low, high=kind.high, trials=trials, scratch=scratch)
    _symmetric_codes(X, scale, kind, scratch)
    _, wl2, _, _, _ = _moments(W, scratch)
    d, ls = _search_integers(scale.view(-1, per), wl2.view(-1, per), kind)

    def error_of(ls: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _symmetric_codes(X, (d * ls).view(-1), kind, scratch)
        _, wl2, _, wrl, error = (t.view(-1, per) for t in _moments(W, scratch))
        return error.sum(1, keepdim=True), wl2, wrl

    found = ls, d.half().float()
    error, wl2, wrl = error_of(*found)
    refit = _refit_symmetric(*found, wl2, wrl, kind)
    _select_((error_of(*refit)[0] < error).float(), *zip(found, refit, strict=True))
    ls, d = found
    L = _symmetric_codes(X, (d * ls).view(-1), kind, scratch)
    return _as_bytes(L.sub_(kind.low)), ls.sub_(kind.scale_low).to(torch.uint8), as_half(d)


def _refit_symmetric(ls: Tensor, d: Tensor, wl2: Tensor, wrl: Tensor, kind: KQuant) -> tuple[Tensor, Tensor]:
    """One least-squares step with the codes fixed, as _refit_affine: the new ls [super_blocks, groups] and d [super_blocks, 1]."""
    new_ls = torch.nan_to_num(ls + wrl / (wl2 * d), 0, 0, 0).round_().clamp_(kind.scale_low, kind.scale_high)
    wrl = wrl - d * (new_ls - ls) * wl2
    new_d = d + (new_ls * wrl).sum(1, keepdim=True) / (new_ls * new_ls * wl2).sum(1, keepdim=True).clamp_min_(TINY)
    return new_ls, new_d.clamp_(-HALF_MAX, HALF_MAX).half().float()


def search_affine(
    X: Tensor, W: Tensor, *, levels: int, trials: tuple[float, ...], signed_minimum: bool = False, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and minimum of each group with the least weighted squared error among trial ranges, each fitted by least squares.

    X, W: float32 [group, groups]. scratch: float32 [4, group, groups], overwritten; made here if absent.
    Returns scale and minimum, [groups]; the minimum is <= 0 unless signed_minimum.
    Source: ggml make_qkx3_quants; w = scale * code + minimum, code = round((x - minimum) * (levels + trial) / (max - minimum)).
    """
    Y, WY, L, U = X.new_empty(4, *X.shape) if scratch is None else scratch
    low = X.amin(0)
    if not signed_minimum:
        low.clamp_max_(0)
    # Sums are taken of y = x - low: of x they would lose the error of a group that is far from zero.
    torch.sub(X, low, out=Y)
    torch.mul(W, Y, out=WY)
    span, sw, wy = Y.amax(0), W.sum(0), WY.sum(0)
    best_scale, best_shift, best_gain = span / levels, torch.zeros_like(span), torch.zeros_like(span)
    better = torch.empty_like(span)
    for trial in trials:
        inverse = (levels + trial) / torch.maximum(span - best_shift, SINGULAR * span + TINY)
        torch.addcmul(-best_shift * inverse, Y, inverse, out=L).round_().clamp_(0, levels)
        wyl = torch.mul(WY, L, out=U).sum(0)
        wl = torch.mul(W, L, out=U).sum(0)
        wl2 = U.mul_(L).sum(0)
        det, noise = sw * wl2 - wl * wl, SINGULAR * sw * wl2 + TINY
        # A group of equal values has no least-squares shift: it gets none, so that its minimum costs nothing.
        shift = (wl2 * wy - wl * wyl) / torch.maximum(det, noise) * torch.gt(det, noise, out=better)
        if not signed_minimum:
            shift = torch.minimum(shift, -low)
        # The best scale for this shift; with the shift of least squares it is the scale of least squares.
        scale = (wyl - shift * wl) / wl2.clamp_min_(TINY)
        gain = scale * (2 * (wyl - shift * wl) - scale * wl2) + shift * (2 * wy - shift * sw)
        torch.gt(gain, best_gain, out=better)
        _select_(better, (best_gain, gain), (best_scale, scale), (best_shift, shift))
    return best_scale, best_shift + low


def search_scale(X: Tensor, W: Tensor, *, low: int, high: int, trials: tuple[float, ...], scratch: Tensor | None = None) -> Tensor:
    """The scale of each group with the least weighted squared error among trial ranges, each fitted by least squares.

    X, W: float32 [group, groups]. Codes low .. high; the value of largest magnitude goes to low, or to high when low is 0.
    scratch: float32 [4, group, groups], overwritten; made here if absent.
    Returns scale [groups], of either sign; 0 for a group of zeros.
    Source: ggml make_qx_quants (low < 0) and make_qp_quants (low = 0).
    """
    WX, L, U, _ = X.new_empty(4, *X.shape) if scratch is None else scratch
    torch.mul(W, X, out=WX)
    top, bottom = X.amax(0), X.amin(0)
    peak = torch.where(top >= -bottom, top, bottom)
    edge, away = (low, -1) if low else (high, 1)
    best_scale, best_gain, better = peak / edge, torch.zeros_like(peak), torch.empty_like(peak)
    inverse_peak = reciprocal(peak)
    for trial in trials:
        torch.mul(X, (edge + away * trial) * inverse_peak, out=L).round_().clamp_(low, high)
        wxl = torch.mul(WX, L, out=U).sum(0)
        scale = wxl / L.square_().mul_(W).sum(0).clamp_min_(TINY)
        gain = scale * wxl
        torch.gt(gain, best_gain, out=better)
        _select_(better, (best_gain, gain), (best_scale, scale))
    return best_scale


def _select_(better: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """In each pair (old, new), old becomes new where better (float, 0 or 1) is 1."""
    for old, new in pairs:
        # lerp with a weight of 0 or 1 is exact for finite numbers, and ten times as fast as torch.where on a CPU.
        old.lerp_(new, better)


def _search_integers(values: Tensor, weights: Tensor, kind: KQuant) -> tuple[Tensor, Tensor]:
    """The float of each super-block [super_blocks, 1] and the integer of each group [super_blocks, groups] nearest to values."""
    columns = values.t().contiguous(), weights.t().contiguous()
    unit = search_scale(*columns, low=kind.scale_low, high=kind.scale_high, trials=NEAR_TRIALS).unsqueeze(1)
    return unit, (values * reciprocal(unit)).round_().clamp_(kind.scale_low, kind.scale_high)


def _affine_codes(X: Tensor, scale: Tensor, minimum: Tensor, levels: int, scratch: Tensor) -> Tensor:
    """Nearest codes of x = scale * code - minimum in scratch[0], also returned, and what is left of x in scratch[1]."""
    L, R, _, _ = scratch
    inverse = reciprocal(scale)
    torch.addcmul(minimum * inverse, X, inverse, out=L).round_().clamp_(0, levels)
    torch.add(X, minimum, out=R).addcmul_(L, scale, value=-1)
    return L


def _symmetric_codes(X: Tensor, scale: Tensor, kind: KQuant, scratch: Tensor) -> Tensor:
    """Nearest codes of x = scale * code in scratch[0], also returned, and what is left of x in scratch[1]."""
    L, R, _, _ = scratch
    torch.mul(X, reciprocal(scale), out=L).round_().clamp_(kind.low, kind.high)
    torch.addcmul(X, L, scale, value=-1, out=R)
    return L


def _moments(W: Tensor, scratch: Tensor) -> tuple[Tensor, ...]:
    """Sums over each group of w l, w l^2, w r, w r l, w r^2 of l = scratch[0] and r = scratch[1]; [groups] each."""
    L, R, U, V = scratch
    wl = torch.mul(W, L, out=U).sum(0)
    wl2 = U.mul_(L).sum(0)
    wr = torch.mul(W, R, out=U).sum(0)
    wrl = torch.mul(U, L, out=V).sum(0)
    return wl, wl2, wr, wrl, U.mul_(R).sum(0)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for magnitudes below TINY."""
    return torch.where(scale.abs() < TINY, 0, scale.reciprocal())


def signed_peak(X: Tensor) -> Tensor:
    """The first value of largest magnitude of each row [rows, 1] of X [rows, columns]."""
    top, bottom = X.amax(1, keepdim=True), X.amin(1, keepdim=True)
    peak = torch.where(top >= -bottom, top, bottom)
    tied = ((top == -bottom) & (top > 0)).squeeze(1).nonzero().squeeze(1)
    if tied.numel():
        peak[tied] = X[tied].gather(1, X[tied].abs().argmax(1, keepdim=True))
    return peak


def as_half(scale: Tensor) -> Tensor:
    """The float16 that a block stores; raises FormatError when it overflows."""
    half = scale.half()
    if not torch.isfinite(half).all():
        raise FormatError(TOO_LARGE)
    return half


def _as_bytes(L: Tensor) -> Tensor:
    """[group, groups] float codes to uint8 [super_blocks, 256]."""
    return L.to(torch.uint8).t().reshape(-1, SUPER_BLOCK)


def join_fields(fields: Tensor, bits: int) -> Tensor:
    """Put fields[..., j, :] (uint8 [..., count, bytes]) at bit j * bits of each byte: uint8 [..., bytes]."""
    joined = fields[..., 0, :] | fields[..., 1, :] << bits
    for j in range(2, fields.shape[-2]):
        joined |= fields[..., j, :] << (bits * j)
    return joined


def split_fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of join_fields: uint8 [..., bytes] to [..., count, bytes]."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    return packed.unsqueeze(-2) >> shifts & (1 << bits) - 1


def read_half(field: Tensor) -> Tensor:
    """The float16 numbers of uint8 [blocks, 2 bytes each], as float32."""
    return field.contiguous().view(torch.float16).float()


def _pack_q2_k(codes: Tensor, ls: Tensor, lm: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    return torch.cat([ls | lm << 4, _quarter_bytes(codes), d.view(torch.uint8), dmin.view(torch.uint8)], dim=1)


def _pack_q3_k(codes: Tensor, ls: Tensor, d: Tensor) -> Tensor:
    high_bits = join_fields((codes >> 2).view(-1, 8, 32), 1)
    scales = torch.cat([join_fields((ls & 15).view(-1, 2, 8), 4), join_fields((ls >> 4).view(-1, 4, 4), 2)], dim=1)
    return torch.cat([high_bits, _quarter_bytes(codes & 3), scales, d.view(torch.uint8)], dim=1)


def _pack_q4_k(codes: Tensor, ls: Tensor, lm: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), _six_bit_pairs(ls, lm), _half_bytes(codes)], dim=1)


def _pack_q5_k(codes: Tensor, ls: Tensor, lm: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    high_bits = join_fields((codes >> 4).view(-1, 8, 32), 1)
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), _six_bit_pairs(ls, lm), high_bits, _half_bytes(codes & 15)], dim=1)


def _pack_q6_k(codes: Tensor, ls: Tensor, d: Tensor) -> Tensor:
    low_bits = join_fields((codes & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high_bits = join_fields((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low_bits, high_bits, ls ^ 128, d.view(torch.uint8)], dim=1)


def _half_bytes(codes: Tensor) -> Tensor:
    return join_fields(codes.view(-1, 4, 2, 32), 4).flatten(1)


def _quarter_bytes(codes: Tensor) -> Tensor:
    return join_fields(codes.view(-1, 2, 4, 32), 2).flatten(1)


def _six_bit_pairs(ls: Tensor, lm: Tensor) -> Tensor:
    """Eight 6-bit scales and minima [super_blocks, 8] in 12 bytes; the top two bits of the last four are in the first eight bytes."""
    last = ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4
    return torch.cat([ls[:, :4] | ls[:, 4:] >> 4 << 6, lm[:, :4] | lm[:, 4:] >> 4 << 6, last], dim=1)


_PACK: dict[str, Callable[..., Tensor]] = {
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
}
