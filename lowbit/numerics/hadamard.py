"""Hadamard matrices of many orders, and the fast orthogonal transform that is made of them.

Sylvester (1867): H_2n = H_2 (x) H_n. Paley, "On Orthogonal Matrices", J. Math. Phys. 12 (1933): order q + 1 for a prime power q = 3 mod 4, and 2 (q + 1)
for q = 1 mod 4, from the quadratic character of the field of q elements. Williamson, "Hadamard's Determinant Theorem and the Sum of Four Squares",
Duke Math. J. 11 (1944): order 4t from four symmetric circulant matrices with A^2 + B^2 + C^2 + D^2 = 4t I.

Of the matrices of one order those are taken that the authors of QuIP# take (they have 12 of these orders), so that both transforms are the same.

The transform of n = m 2^k numbers is U = (B (x) H) / sqrt(n), B of order m, H Sylvester's of order 2^k: H H^T = n I makes it orthogonal, and every entry has the
same magnitude, which is what spreads outliers (QuIP#, arXiv:2402.04396, section 3). Where no B is known (n odd, or 4 times 47, ...) the cosine
transform of the odd part takes its place: orthogonal too, its entries at most sqrt(2) times as large.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ShapeError

LARGEST_BASE = 4096  # order of the other factor
LARGEST_FACTOR = 64  # of Sylvester's matrix, which is applied as several factors

# t: the first (t + 1) / 2 signs of the first rows of A, B, C and D; the others mirror them. All but 23 are those of Sloane's library of Hadamard matrices.
WILLIAMSON: dict[int, str] = {
    13: "+-+--++ +---+++ ++-+--+ +----+-",
    23: "+--+-+-+++++ +--++-+-+-++ +++---++--++ +--+--+++---",
    29: "++--+--+-+++-++ ++++-++-+---+++ +-+---++--+-+++ +++---++--+-+--",
    31: "+--+++-+--+----+ +--+++-+--+----+ +-----+++-+-+--+ ++++++---+-+-++-",
    39: "+++--+-+-----+--++-- ++++---+--++----+-+- +++--++-+---+-+--+-- +---++-+-+-----+++-+",
    43: "+---++--++++-+-+++-++- ++-++++++----+-+--++-+ +++-+-++--+-+-++++-+-- ++---++++-+--+--++----",
}


def mix(x: Tensor) -> Tensor:
    """x U^T along the last axis: x [..., n], in float32 or float64."""
    return _apply(x, transposed=False)


def unmix(y: Tensor) -> Tensor:
    """y U along the last axis, the inverse of mix."""
    return _apply(y, transposed=True)


def hadamard(order: int) -> Tensor:
    """A matrix of 1 and -1, int8 [order, order], with orthogonal rows; ShapeError where none of the constructions makes one."""
    found = _matrix(order)
    if found is None:
        raise ShapeError(f"no Hadamard matrix of order {order} is made by the constructions of Sylvester, Paley and Williamson here.")
    return found.clone()


def is_flat(n: int) -> bool:
    """Whether the transform of n numbers is made of Hadamard matrices alone, so that all its entries have one magnitude."""
    return n == _power_of_two(n) or _base(n)[1]


def _apply(x: Tensor, *, transposed: bool) -> Tensor:
    n = x.shape[-1]
    power = _power_of_two(n)
    rest = n
    if n != power:
        base, _ = _base(n)
        rest = n // len(base)
        B = base.to(x.device, x.dtype)
        x = ((B.T if transposed else B) @ x.reshape(*x.shape[:-1], len(base), rest)).reshape(x.shape)
    # Sylvester's matrix is its own transpose; of rest = a b ... numbers it is H_a (x) H_b (x) ..., one product each.
    done = 1
    while done < rest:
        size = min(LARGEST_FACTOR, rest // done)
        H = _sylvester(size).to(x.device, x.dtype)
        x = (H @ x.reshape(*x.shape[:-1], n // (size * done), size, done)).reshape(x.shape) if done > 1 else (x.reshape(*x.shape[:-1], n // size, size) @ H).reshape(x.shape)
        done *= size
    return x / math.sqrt(rest if n != power and not _base(n)[1] else n)


def _power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    if n < 1:
        raise ShapeError(f"a transform of {n} numbers was asked for; expected at least 1.")
    return n & -n


@lru_cache(maxsize=64)
def _base(n: int) -> tuple[Tensor, bool]:
    """The factor that is not Sylvester's: the smallest Hadamard matrix of order odd(n) 2^j dividing n, int8; else the orthonormal cosine transform of odd(n)."""
    odd = n // _power_of_two(n)
    found = _matrix(_base_order(n))
    if found is not None:
        return found, True
    j, i = torch.meshgrid(torch.arange(odd, dtype=torch.float64), torch.arange(odd, dtype=torch.float64), indexing="ij")
    cosine = torch.cos(math.pi * (2 * i + 1) * j / (2 * odd)) * math.sqrt(2 / odd)
    cosine[0] /= math.sqrt(2)
    return cosine, False


@lru_cache(maxsize=64)
def _matrix(order: int) -> Tensor | None:
    if order < 1:
        return None
    if order & (order - 1) == 0:
        return _sylvester(order)
    if order % 4:
        return None
    for made in (_williamson(order), _paley(order)):
        if made is not None:
            return made
    half = _matrix(order // 2) if order % 8 == 0 else None
    return None if half is None else torch.kron(_sylvester(2), half)


def check(n: int) -> None:
    """Raise ShapeError where the transform of n numbers would need a factor that is too large to hold."""
    _base_order(n)


@lru_cache(maxsize=256)
def _base_order(n: int) -> int:
    """The order of the factor that is not Sylvester's; at most LARGEST_BASE."""
    odd = n // _power_of_two(n)
    order = odd
    while n % order == 0 and order <= LARGEST_BASE:
        if _is_constructible(order):
            return order
        order *= 2
    if odd > LARGEST_BASE:
        raise ShapeError(f"a Hadamard transform of {n} numbers needs a matrix of order {odd} or more; {LARGEST_BASE} is the largest that is made.")
    return odd


def _is_constructible(order: int) -> bool:
    if order & (order - 1) == 0 or order // 4 in WILLIAMSON and order % 4 == 0:
        return True
    return order % 4 == 0 and any(q % 4 == rest and _prime_power(q) is not None for q, rest in ((order - 1, 3), (order // 2 - 1, 1)))


@lru_cache(maxsize=16)
def _sylvester(order: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.int8)
    while len(H) < order:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def _paley(order: int) -> Tensor | None:
    """His first construction, then the second; fields of a prime number of elements before those of a power."""
    fields = [(kind, field) for kind, q, rest in ((1, order - 1, 3), (2, order // 2 - 1, 1)) if q % 4 == rest and (field := _prime_power(q))]
    if not fields:
        return None
    kind, (p, k) = min(fields, key=lambda found: (found[1][1], found[0]))
    chi = _characters(p, k)
    one = torch.eye(len(chi) + 1, dtype=torch.int8)
    S = torch.zeros_like(one)
    S[0, 1:], S[1:, 0], S[1:, 1:] = -1 if kind == 1 else 1, 1, chi
    return S + one if kind == 1 else torch.cat([torch.cat([S + one, S - one], 1), torch.cat([S - one, -S - one], 1)])


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, k at most 3."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p > 1 and p**k == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _characters(p: int, k: int) -> Tensor:
    """chi(a - b) for all elements a, b of the field of p^k: 1 of a square, -1 of another, 0 of zero; int8 [q, q]."""
    q = p**k
    digits = [[e // p**i % p for i in range(k)] for e in range(q)]
    modulus = _irreducible(p, k)
    squares = {tuple(_times(a, a, modulus, p)) for a in digits[1:]}
    chi = torch.tensor([0] + [1 if tuple(a) in squares else -1 for a in digits[1:]], dtype=torch.int8)
    table = torch.tensor(digits)
    difference = (table.unsqueeze(1) - table.unsqueeze(0)) % p
    return chi[(difference * torch.tensor([p**i for i in range(k)])).sum(-1)]


def _irreducible(p: int, k: int) -> list[int]:
    """c with x^k = c_0 + c_1 x + ...: the first polynomial without a root (which is enough for a degree of at most 3)."""
    if k == 1:
        return [0]
    for number in range(p**k):
        c = [number // p**i % p for i in range(k)]
        if all((x**k - sum(value * x**i for i, value in enumerate(c))) % p for x in range(p)):
            return c
    raise AssertionError(f"a field of {p}^{k} elements exists")


def _times(a: list[int], b: list[int], modulus: list[int], p: int) -> list[int]:
    k = len(a)
    product = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    for degree in range(2 * k - 2, k - 1, -1):  # x^degree = x^(degree - k) * modulus
        for i, c in enumerate(modulus):
            product[degree - k + i] += product[degree] * c
        product[degree] = 0
    return [value % p for value in product[:k]]


def _williamson(order: int) -> Tensor | None:
    t = order // 4
    if t not in WILLIAMSON:
        return None
    A, B, C, D = (_circulant(half) for half in WILLIAMSON[t].split())
    return torch.cat([torch.cat(row, 1) for row in ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))])


def _circulant(half: str) -> Tensor:
    """The symmetric circulant matrix whose first row begins so."""
    row = torch.tensor([1 if sign == "+" else -1 for sign in half + half[:0:-1]], dtype=torch.int8)
    return torch.stack([row.roll(i) for i in range(len(row))])
