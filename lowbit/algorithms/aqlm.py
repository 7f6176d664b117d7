"""AQLM: codes and codebooks of additive quantization, chosen in turn for the least error of the layer's outputs.

Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", arXiv:2401.06118, section 3.1: minimise tr(dW H dW^T), H = X X^T, over

1. the codes: beam search, one vector of 8 weights and one codebook at a time, all rows together. With the other codes fixed the loss of a candidate c is
   quadratic, -2 s c . P + s^2 c H_jj c^T (P: the residual's product with H where this code is left out), so all of them cost two matrix products;
2. the codebooks and the rows' scales. The authors take 100 steps of Adam; the loss is a quadratic function of the codebooks, so here conjugate gradients with
   the diagonal as preconditioner solve for them, and each row's scale has a closed form.

Start: residual k-means, with a single codebook weighted with diag(H) (theirs is unweighted; with several codebooks that ends lower). A round is 2. and 1.; rounds end
when they gain less than a share of the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import numerics
from ..errors import RecipeError
from ..numerics import additive
from ..scheme import Scheme
from ..stats import LayerStats
from ..tensor import QuantizedTensor
from .error import exact_output_energy
from .gptq import dead_columns
from .guided import GuidedOptions

GROUP = additive.GROUP
STOP = 1e-8


@dataclass(frozen=True)
class AqlmOptions(GuidedOptions):
    """kmeans: steps of k-means for each codebook. rounds: at most so many; tolerance: stop when one gains less than this share of the error.

    beam: hypotheses kept for each row in the search. steps: of conjugate gradients in each round. damp: added to H's diagonal, as a share of its mean.
    seed: of the k-means' starting points. And those of GuidedOptions.
    """

    kmeans: int = 50
    rounds: int = 20
    tolerance: float = 0.01
    beam: int = 1
    steps: int = 4
    damp: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.kmeans, self.rounds, self.steps) < 0 or self.beam < 1 or not 0 <= self.damp <= 1 or not 0 <= self.tolerance < 1:
            raise RecipeError(
                f"kmeans {self.kmeans}, rounds {self.rounds}, steps {self.steps}, beam {self.beam}, damp {self.damp}, tolerance {self.tolerance}: "
                "expected counts of 0 or more, a beam of at least 1, and shares between 0 and 1."
            )


def aqlm(W: Tensor, scheme: Scheme, stats: LayerStats, options: AqlmOptions, notes: list[str]) -> QuantizedTensor:
    """Quantize W [out_features, in_features] to additive codebooks; stats.hessian as in gptq. W and stats are not changed."""
    assert stats.hessian is not None
    numerics.check_shape(scheme, tuple(W.shape))
    W32, H = W.float(), stats.hessian if stats.hessian.ndim == 2 else stats.hessian.mean(0)
    mean = H.diagonal().mean()
    if not bool(torch.isfinite(H).all()) or mean <= 0:
        notes.append("the Hessian is zero or not finite: k-means of the weights alone was used")
        return numerics.quantize(W, scheme)
    if dead := int((H.diagonal() <= 0).sum()):
        notes.append(dead_columns(dead))
    H = H / mean
    H.diagonal().add_(options.damp)
    weights = H.diagonal() if additive.KINDS[scheme.format][0] == 1 else None
    codes, books, scale = additive.residual_kmeans(W32, scheme, weights, steps=options.kmeans, seed=options.seed)
    state = _State(W32, H, codes, books, scale)
    best = state.error()
    for _ in range(options.rounds):
        state.fit(options.steps)
        state.search(options.beam)
        error = state.error()
        if error > (1 - options.tolerance) * best:
            break
        best = error
    state.fit(options.steps)
    return additive.from_codes(state.codes, state.books, state.scale, scheme, str(W.dtype).removeprefix("torch."))


class _State:
    """codes [n, J, M], books [M, K, 8], scale [n] of one matrix."""

    def __init__(self, W: Tensor, H: Tensor, codes: Tensor, books: Tensor, scale: Tensor) -> None:
        self.W, self.H, self.codes, self.books, self.scale = W, H, codes, books, scale

    def decoded(self) -> Tensor:
        return additive.decode(self.codes, self.books, self.scale)

    def error(self) -> float:
        """tr(dW H dW^T)."""
        return exact_output_energy(self.W - self.decoded(), self.H)

    def fit(self, steps: int) -> None:
        """Scales of all rows in closed form, then the codebooks by conjugate gradients; codes stay."""
        shape = additive.decode(self.codes, self.books, torch.ones_like(self.scale))
        product = shape @ self.H
        power = (product * shape).sum(1)
        fitted = (product * self.W).sum(1) / power
        self.scale = torch.where((power > 0) & (fitted > 0), fitted, self.scale)
        residual = self._gather((self.W - self.decoded()) @ self.H)
        diagonal = self._diagonal()
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
        z = residual * inverse
        direction, gain = z, (residual * z).sum()
        first = gain
        for _ in range(steps):
            if not gain > 0:
                break
            image = self._gather(additive.decode(self.codes, direction, self.scale) @ self.H)
            curvature = (direction * image).sum()
            if not curvature > 0:
                break
            step = gain / curvature
            self.books = self.books + step * direction
            residual = residual - step * image
            z = residual * inverse
            following = (residual * z).sum()
            if following < STOP * first:  # what is left is rounding error, which more steps would amplify
                break
            direction, gain = z + following / gain * direction, following

    def _gather(self, G: Tensor) -> Tensor:
        """The transpose of decoding: G [n, in] times the rows' scales, summed where each vector of a codebook is used; [M, K, 8]."""
        G = (G * self.scale.unsqueeze(1)).view(-1, GROUP)
        return torch.stack([torch.zeros_like(book).index_add_(0, self.codes[..., m].flatten(), G) for m, book in enumerate(self.books)])

    def _diagonal(self) -> Tensor:
        """The diagonal of the quadratic form in the codebooks (pairs of equal codes in a row left out), [M, K, 8]."""
        own = (self.scale.square().unsqueeze(1) * self.H.diagonal()).view(-1, GROUP)
        return torch.stack([torch.zeros_like(book).index_add_(0, self.codes[..., m].flatten(), own) for m, book in enumerate(self.books)])

    def search(self, beam: int) -> None:
        """One pass over all vectors and codebooks; each row keeps its beam best combinations. Rows are independent: with a beam, some at a time."""
        n, clusters = len(self.W), self.books.shape[1]
        chunk = n if beam == 1 else max(1, 4 * additive.CHUNK_NUMBERS // (beam * clusters))
        self.codes = torch.cat([self._search_rows(beam, slice(start, start + chunk)) for start in range(0, n, chunk)])

    def _search_rows(self, beam: int, some: slice) -> Tensor:
        W, sizes = self.W[some], self.scale[some]
        n, scale, clusters = len(W), sizes.view(1, -1, 1), self.books.shape[1]
        D = W - additive.decode(self.codes[some], self.books, sizes)
        R = (D @ self.H).unsqueeze(0)  # [beam, n, in]
        loss = (R[0] * D).sum(1).unsqueeze(0)  # [beam, n]
        codes = self.codes[some].unsqueeze(0)
        rows = torch.arange(n)
        for j in range(codes.shape[2]):
            columns = slice(j * GROUP, (j + 1) * GROUP)
            Hj = self.H[columns]
            Hjj = Hj[:, columns]
            for m, book in enumerate(self.books):
                old = book[codes[:, :, j, m]] * scale
                rest = R[:, :, columns] + old @ Hjj  # the residual's product where this code is left out
                power = ((book @ Hjj) * book).sum(1)
                if beam == 1:
                    new = additive.cheapest(rest[0], power.unsqueeze(0), sizes.unsqueeze(1), book).unsqueeze(0)  # divided by the scale
                else:
                    candidates = torch.addcmul(scale.square() * power, -2 * scale, rest @ book.T)  # [beam, n, K]
                    candidates += (loss + 2 * (old * R[:, :, columns]).sum(-1) + ((old @ Hjj) * old).sum(-1)).unsqueeze(-1)
                    kept = min(beam, len(candidates) * clusters)
                    least, index = candidates.permute(1, 0, 2).reshape(n, -1).topk(kept, largest=False)
                    source, new = (index // clusters).T, (index % clusters).T
                    codes, R, old, loss = codes[source, rows], R[source, rows], old[source, rows], least.T
                change = book[new] * scale - old
                R = R - change @ Hj if beam > 1 else R.sub_(change @ Hj)
                codes = codes.clone() if m == 0 and j == 0 else codes
                codes[:, :, j, m] = new
        return codes[0].clone()

