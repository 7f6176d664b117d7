"""Where an adapter starts, so that it makes up for the rounding of its base.

With E = W - Q, what rounding took from a matrix [out_features, in_features], of which the adapter B A can hold a part of rank r:

    loftq       Q = quantize(W - B A), B A = SVD_r(W - Q), in turn                  Li et al., "LoftQ", arXiv:2310.08659, algorithm 1
    weighted    B A = SVD_r(E L) L^-1, L L^T = H, the Hessian sum x x^T of the inputs; it minimises |(E - B A) L|, the error of the layer's output. Q stays

With U the first r left singular vectors of E L, which are the first eigenvectors of E H E^T, SVD_r(E L) L^-1 = U U^T E: nothing is factorized or inverted, and H may be singular.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from .. import __version__, numerics
from ..algorithms import algorithm
from ..checkpoints import Checkpoint, LazyQuantized
from ..errors import RecipeError
from ..models import skeleton as sk
from ..models.linears import Linear, find_linears
from ..numerics import parts
from ..pipeline.calibration import Windows
from ..pipeline.collect import Collector, Current, StopBlock, symmetrize
from ..pipeline.hidden import HiddenStates
from ..pipeline.recipes import LayerPlan
from ..pipeline.streaming import Streamer
from ..progress import Progress
from ..recipe import Recipe
from ..tensor import QuantizedTensor

Start = dict[str, tuple[Tensor, Tensor]]  # by module: A [rank, in_features], B [out_features, rank], whose product is added to the weight
INITS = ("default", "loftq", "weighted")
LOFTQ_STEPS = 5


def low_rank(E: Tensor, rank: int, H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A [rank, in_features], B [out_features, rank], float32, with the least |(E - B A) L|; H = L L^T [in_features, in_features], or None: all inputs count the same."""
    E = E.double()
    Q, R = torch.linalg.qr(E) if E.shape[0] > E.shape[1] else (None, E)
    _, vectors = torch.linalg.eigh(R @ R.T if H is None else R @ H.double() @ R.T)
    U = vectors[:, -rank:].flip(1)
    A, B = U.T @ R, U if Q is None else Q @ U
    share = A.norm(dim=1).sqrt().clamp(min=1e-30)
    return (A / share.unsqueeze(1)).float(), (B * share).float()


def loftq(W: Tensor, plan: LayerPlan, rank: int) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Q, A and B of the least |W - Q - B A| of LOFTQ_STEPS rounds; W [out_features, in_features] is not changed."""
    W32, added = W.float(), torch.zeros(())
    best, least = None, float("inf")
    for _ in range(LOFTQ_STEPS):
        made = algorithm(plan.algorithm).run((W32 - added).to(W.dtype), plan.scheme, None, plan.options, [])
        E = W32 - numerics.dequantize(made)
        A, B = low_rank(E, rank)
        added = B @ A
        if (error := float((E - added).square().sum())) < least:
            best, least = (made, A, B), error
    assert best is not None
    return best


def loftq_base(built: sk.Skeleton, recipe: Recipe, plans: dict[str, LayerPlan], rank: int, progress: Progress) -> tuple[Checkpoint, Start]:
    """The base that LoftQ makes of a dense model, and the start that belongs to it. Experts are rounded plainly."""
    source, start = built.checkpoint, Start()
    quantized: dict[str, LazyQuantized] = {}
    with progress.step("LoftQ", len(built.blocks)) as advance:
        for index in range(len(built.blocks)):
            for linear in find_linears(built, index):
                if linear.name not in plans:
                    continue
                W, plan = dense(source, linear), plans[linear.name]
                if linear.expert is None:
                    _refuse_rank(linear, rank)
                    made, *start[module_name(built, index, linear)] = loftq(W, plan, rank)  # type: ignore[assignment]
                else:
                    made = algorithm(plan.algorithm).run(W, plan.scheme, None, plan.options, [])
                quantized[linear.name] = _packed(made, source.lazy(linear.name).dtype)
            advance()
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in quantized}
    layers = {name: {"scheme": entry.scheme.name, "algorithm": plans[name].algorithm, "shape": list(entry.shape)} for name, entry in quantized.items()}
    provenance: dict = {"lowbit": __version__, "recipe": recipe.to_dict(), "refinement": {"method": "loftq", "rank": rank, "steps": LOFTQ_STEPS}, "calibration": None, "notes": [], "layers": layers}
    return replace(source, tensors=tensors, quantized=quantized, provenance=provenance), {name: tuple(pair) for name, pair in start.items()}  # type: ignore[misc]


def weighted_start(base: sk.Skeleton, original: Checkpoint, windows: Windows, rank: int, dtype: torch.dtype, device: torch.device, progress: Progress) -> Start:
    """What a base rounded away of its original, weighted by the inputs that the base itself gives to its layers; block by block, one in memory at a time."""
    streamer = Streamer(base, windows.batches(), dtype=dtype, device=device)
    states, start = HiddenStates(streamer.shapes, streamer.hidden_size, dtype), Start()
    streamer.record(states)
    with progress.step("Weighing the rounding error", streamer.depth) as advance, torch.no_grad():
        for index in range(streamer.depth):
            block = streamer.load_block(index)
            linears = [linear for linear in find_linears(base, index) if linear.expert is None and linear.name in base.checkpoint.quantized]
            run = lambda number, block=block, index=index: streamer.run_block(block, index, number, states.read(number, device))
            collector = Collector(block, linears)
            groups = collector.discover(lambda run=run: run(0)) if linears else []
            if groups:
                with collector.collect(groups, ("hessian",), Current()):
                    for number in range(len(streamer.batches)):
                        with suppress(StopBlock):
                            run(number)
            for group in groups:
                H = None if group.stats.hessian is None else symmetrize(group.stats.hessian)
                for linear in group.linears:
                    _refuse_rank(linear, rank)
                    E = dense(original, linear).to(device).float() - numerics.dequantize(base.checkpoint.quantized[linear.name].load()).to(device)
                    A, B = low_rank(E, rank, H)
                    start[module_name(base, index, linear)] = A.cpu(), B.cpu()
            streamer.run(block, index, states, states)
            advance()
    return start


def dense(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    """A matrix of a dense checkpoint, [out_features, in_features]."""
    W = checkpoint.dense(linear.name)
    return W.T.contiguous() if linear.transposed and linear.name not in checkpoint.quantized and linear.expert is None else W


def module_name(built: sk.Skeleton, index: int, linear: Linear) -> str:
    """The path of a linear layer in its model."""
    return f"{built.block_name(index)}.{linear.module}"


def _packed(qt: QuantizedTensor, dtype: torch.dtype) -> LazyQuantized:
    """A matrix that stays in memory, packed."""
    stored, name = parts.store(qt), str(dtype).removeprefix("torch.")
    return LazyQuantized(qt.scheme, qt.shape, dtype, lambda: parts.restore(stored, qt.scheme, qt.shape, name), numerics.nbytes(qt.scheme, qt.shape))


def _refuse_rank(linear: Linear, rank: int) -> None:
    if rank > min(linear.shape):
        raise RecipeError(f"{linear.name} is {linear.shape[0]} x {linear.shape[1]}, and its error has no part of rank {rank}. Take a smaller --rank, or --init default.")
