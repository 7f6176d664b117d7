"""Quantizing the matrices of one block: one call per set of matrices that share input, scheme and algorithm, with a record of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import numerics
from ..algorithms import algorithm
from ..algorithms.error import output_energy
from ..algorithms.gptq import dead_columns
from ..errors import ModelError
from ..models.linears import Linear, get_weight, set_weight
from ..numerics import outliers
from ..stats import LayerStats, merge
from ..tensor import QuantizedTensor
from .collect import InputGroup, symmetrize
from .recipes import LayerPlan

HISTOGRAM_BINS = 40


def quantize_group(block: nn.Module, group: InputGroup, plans: dict[str, LayerPlan], dtypes: dict[str, str]) -> tuple[dict[str, QuantizedTensor], dict[str, dict]]:
    """Quantize the matrices of an input group, put the decoded values into the block, and say what was done.

    dtypes: each weight's own dtype in the checkpoint. Returns the tensors and their records by name.
    """
    settle(group.stats)
    tensors: dict[str, QuantizedTensor] = {}
    records: dict[str, dict] = {}
    for linears in _alike(group.linears, plans):
        plan = plans[linears[0].name]
        W = torch.cat([get_weight(block, linear).float().cpu() for linear in linears])
        notes: list[str] = []
        made = _choose_codes(W, plan, group.stats, notes, linears[0].name)
        decoded = numerics.dequantize(made)
        rounded = _rounded(W, plan) if group.stats.hessian is not None and plan.algorithm != "rtn" else None
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.shape[0])
            start = rows.stop
            tensors[linear.name] = _rows(made, rows, dtypes[linear.name])
            records[linear.name] = record_of(linear, plans[linear.name], group.stats, W[rows], decoded[rows], None if rounded is None else rounded[rows], notes)
            set_weight(block, linear, decoded[rows])
    return tensors, records


def settle(stats: LayerStats) -> None:
    """Statistics as algorithms take them: on the CPU, wherever the block ran, and with both halves of the Hessian."""
    for name in ("sum_abs", "sum_sq", "absmax", "hessian", "cross", "sample"):
        value = getattr(stats, name)
        if value is not None:
            setattr(stats, name, value.cpu())
    if stats.hessian is not None:
        for H in stats.hessian if stats.hessian.ndim == 3 else [stats.hessian]:
            symmetrize(H)


def _choose_codes(W: Tensor, plan: LayerPlan, stats: LayerStats, notes: list[str], name: str) -> QuantizedTensor:
    entry = algorithm(plan.algorithm)
    needs = entry.needs(plan.options)
    if stats.hessian is not None and not bool(torch.isfinite(stats.hessian.diagonal(dim1=-2, dim2=-1)).all()):
        raise ModelError(f"{name}: the activations that reach it are infinite or NaN. Compute in a wider dtype (--dtype float32), or check the model.")
    if "hessian" in needs and stats.hessian is None:
        notes.append("no token of the calibration text reached it: plain rounding was used")
        return numerics.quantize(W, plan.scheme)
    if needs and stats.n_tokens == 0 and stats.hessian is None:
        notes.append("no token of the calibration text reached it: all inputs count the same")
    if plan.scheme.outliers is None or plan.algorithm == "rtn":
        return entry.run(W, plan.scheme, stats, plan.options, notes)
    index = outliers.choose(W, plan.scheme.outliers, stats.importance())
    found: list[str] = []
    made = entry.run(outliers.without(W, index), outliers.plain(plan.scheme), _without_channels(stats, index), plan.options, found)
    notes += [note for note in found if note != dead_columns(len(index))]
    return outliers.add(made, plan.scheme, W, index)


def _without_channels(stats: LayerStats, index: Tensor) -> LayerStats:
    """The statistics with some input channels silent."""
    rest = replace(stats)
    for name in ("hessian", "cross"):
        product = getattr(stats, name)
        if product is not None:
            product = product.clone()
            product[..., index.long(), :] = 0
            product[..., index.long()] = 0
            setattr(rest, name, product)
    return rest


def _alike(linears: list[Linear], plans: dict[str, LayerPlan]) -> list[list[Linear]]:
    """Matrices with the same plan, which a rowwise algorithm takes as one; others one by one. NVFP4's factor of a matrix then is that of all: programs that make them one layer want it so."""
    sets: dict[object, list[Linear]] = {}
    for linear in linears:
        plan = plans.get(linear.name)
        if plan is None:
            continue
        together = algorithm(plan.algorithm).rowwise and numerics.has_rows(plan.scheme, linear.shape[1])
        sets.setdefault((plan.scheme, plan.algorithm, plan.options, None if together else linear.name), []).append(linear)
    return list(sets.values())


def _rows(qt: QuantizedTensor, rows: slice, dtype: str) -> QuantizedTensor:
    """Some output rows of a quantized matrix, as standing for a weight of the given dtype."""
    if not numerics.has_rows(qt.scheme, qt.shape[1]):
        return replace(qt, dtype=dtype)
    some = numerics.rows_of(qt, rows.start, rows.stop)
    return replace(some, dtype=dtype, parts={key: value.clone() for key, value in some.parts.items()})


def _rounded(W: Tensor, plan: LayerPlan) -> Tensor:
    """Plain rounding of the same weight to the same scheme: what the algorithm is compared with."""
    return numerics.dequantize(numerics.quantize(W, plan.scheme))


def record_of(linear: Linear, plan: LayerPlan, stats: LayerStats, W: Tensor, decoded: Tensor, rounded: Tensor | None, notes: list[str]) -> dict:
    """What is kept of one matrix for the provenance; W, decoded and rounded (the same by plain rounding) [out_features, in_features]."""
    error = decoded - W
    record = {
        "scheme": plan.scheme.name,
        "algorithm": plan.algorithm,
        "shape": list(linear.shape),
        "bits_per_weight": round(numerics.bits_per_weight(plan.scheme, linear.shape), 4),
        "weight_error": _round(float(error.square().sum() / W.square().sum().clamp(min=1e-30))),
    }
    if stats.n_tokens or algorithm(plan.algorithm).needs(plan.options):
        record["tokens"] = stats.n_tokens
    if stats.hessian is not None:
        norm = output_energy(W, stats.hessian)
        record["output_error"] = _round(output_energy(error, stats.hessian) / max(norm, 1e-30))
        if rounded is not None:
            record["rtn_output_error"] = _round(output_energy(rounded - W, stats.hessian) / max(norm, 1e-30))
    if notes or plan.notes:
        record["notes"] = [*plan.notes, *notes]
    record["histograms"] = _histograms(W, error)
    return record


def _histograms(W: Tensor, error: Tensor) -> dict:
    """Counts of weights and of errors in equal bins over [-limit, limit], limit = 4 standard deviations of the weights (errors: a quarter)."""
    limit = float(W.std()) * 4 or 1.0
    counts: dict[str, float | list[int]] = {"limit": _round(limit)}
    for key, values, reach in (("weight", W, limit), ("error", error, limit / 4)):
        counts[key] = torch.histc(values, HISTOGRAM_BINS, -reach, reach).int().tolist()
    return counts


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def share_scarce(groups: list[InputGroup]) -> dict[str, str]:
    """Give experts that saw fewer tokens than they have inputs the statistics of all experts of their layer, as far as they lack.

    H_expert + (in_features - tokens) / tokens_of_all * H_all. Returns a note by weight name.
    """
    notes: dict[str, str] = {}
    for alike in _expert_layers(groups).values():
        pool = LayerStats()
        for group in alike:
            pool = merge(pool, group.stats)
        for group in alike:
            need = group.linears[0].shape[1]
            seen = group.stats.n_tokens
            if seen >= need or pool.n_tokens == 0 or pool.hessian is None:
                continue
            share = (need - seen) / pool.n_tokens
            group.stats.hessian = pool.hessian * share if group.stats.hessian is None else group.stats.hessian + pool.hessian * share
            for linear in group.linears:
                notes[linear.name] = f"this expert saw {seen} tokens of {pool.n_tokens}, fewer than its {need} inputs: the statistics of all experts of the layer were mixed in"
    return notes


def pool_unseen(groups: list[InputGroup]) -> dict[str, str]:
    """Give experts that saw no token what all experts of their layer saw, for the scales of their inputs. Returns a note by weight name."""
    notes: dict[str, str] = {}
    for alike in _expert_layers(groups).values():
        pool = LayerStats()
        for group in alike:
            pool = merge(pool, group.stats)
        seen = [group.stats for group in alike if group.stats.mean_low is not None]
        if seen:
            pool.mean_low = torch.stack([stats.mean_low for stats in seen if stats.mean_low is not None]).amin(0)
            pool.mean_high = torch.stack([stats.mean_high for stats in seen if stats.mean_high is not None]).amax(0)
        for group in alike:
            if group.stats.n_tokens == 0 and pool.n_tokens:
                group.stats = pool
                notes |= {linear.name: "this expert saw no token: the scale of its inputs is that of all experts of the layer" for linear in group.linears}
    return notes


def _expert_layers(groups: list[InputGroup]) -> dict[tuple, list[InputGroup]]:
    layers: dict[tuple, list[InputGroup]] = {}
    for group in groups:
        leader = group.linears[0]
        if leader.expert is not None:
            layers.setdefault((leader.module, leader.parameter), []).append(group)
    return layers
