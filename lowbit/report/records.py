"""What the provenance says of every layer, arranged for drawing: by kind of matrix and by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .words import ranges

CALLED = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "o_proj", "out_proj", "dense", "attn.c_proj",
    "gate_proj", "w1", "gate_up_proj", "up_proj", "w3", "c_fc", "fc1", "dense_h_to_4h", "down_proj", "w2", "mlp.c_proj", "c_proj", "fc2", "dense_4h_to_h",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One quantized matrix. kind: q_proj, ... (as short as is unambiguous); block: None for embedding and head; expert: its number in a mixture."""

    name: str
    kind: str
    block: int | None
    expert: int | None
    record: dict


@dataclass(frozen=True)
class Bar:
    """The loss of one matrix, or of all experts of a block together (rms; worst: of one expert). None: not measured."""

    block: int
    error: float | None
    plain: float | None
    worst: float | None


@dataclass(frozen=True)
class Panel:
    """All matrices of one kind. measure: "output" or "weight"; error, plain: relative errors over all blocks, |difference| / |original| (rms)."""

    kind: str
    measure: str
    bars: list[Bar]
    error: float | None
    plain: float | None


@dataclass(frozen=True)
class Histogram:
    """Counts of one kind over all blocks: weights within 4 standard deviations of their matrix, errors within 1."""

    kind: str
    weight: list[int]
    error: list[int]
    weight_error: float | None


def read(provenance: dict) -> list[Layer]:
    """Every layer of the provenance."""
    records = provenance.get("layers") or {}
    places = {name: _place(name) for name in records}
    short = _shortened({kind for kind, _, _ in places.values()})
    return [Layer(name, short[places[name][0]], *places[name][1:], records[name]) for name in records]


def _place(name: str) -> tuple[tuple[str, ...], int | None, int | None]:
    """model.layers.3.mlp.experts.7.up_proj.weight: (mlp, experts, up_proj), block 3, expert 7."""
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return tuple(parts), None, None
    rest = parts[first + 1 :]
    expert = next((int(part) for part in rest if part.isdecimal()), None)
    return tuple(part for part in rest if not part.isdecimal()), int(parts[first]), expert


def _number(place: int | None) -> int:
    """The number of a block or expert, where there is one by construction."""
    assert place is not None
    return place


def _shortened(kinds: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest endings that tell the kinds apart: q_proj, but attn.c_proj and mlp.c_proj."""

    def short(kind: tuple[str, ...]) -> str:
        for length in range(1, len(kind)):
            if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
                return ".".join(kind[-length:])
        return ".".join(kind)

    return {kind: short(kind) for kind in kinds}


def panels(layers: list[Layer]) -> list[Panel]:
    """Loss of the layers in the blocks, one panel per kind; the output's where it was measured, the weights' otherwise."""
    made = []
    for kind, members in _by_kind(layers).items():
        measure = "output" if any("output_error" in layer.record for layer in members) else "weight"
        blocks: dict[int, list[Layer]] = {}
        for layer in members:
            blocks.setdefault(_number(layer.block), []).append(layer)
        bars = [_bar(block, blocks[block], measure) for block in sorted(blocks)]
        made.append(Panel(kind, measure, bars, *_errors(members, measure)))
    return made


def _by_kind(layers: list[Layer]) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.block is not None:
            kinds.setdefault(layer.kind, []).append(layer)
    return dict(sorted(kinds.items(), key=lambda entry: _rank(entry[0])))


def _rank(kind: str) -> int:
    """The place of a kind in the order in which blocks call their matrices; unknown ones last."""
    return next((i for i, known in enumerate(CALLED) if kind.split(".")[-1] == known or kind == known), len(CALLED))


def _bar(block: int, layers: list[Layer], measure: str) -> Bar:
    worst = max((_rms([layer.record.get(f"{measure}_error")]) or 0.0 for layer in layers), default=None) if len(layers) > 1 else None
    return Bar(block, *_errors(layers, measure), worst)


def _errors(layers: list[Layer], measure: str) -> tuple[float | None, float | None]:
    plain = _rms([layer.record.get("rtn_output_error") for layer in layers]) if measure == "output" else None
    return _rms([layer.record.get(f"{measure}_error") for layer in layers]), plain


def _rms(energies: Iterable[float | None]) -> float | None:
    """Root of the mean of squared relative errors; None if there is none."""
    known = [energy for energy in energies if energy is not None and math.isfinite(energy)]
    return math.sqrt(max(0.0, sum(known) / len(known))) if known else None


def histograms(layers: list[Layer]) -> list[Histogram]:
    """Histograms added up over blocks and experts, one per kind."""
    made = []
    for kind, members in _by_kind(layers).items():
        counts = [layer.record["histograms"] for layer in members if "histograms" in layer.record]
        if counts:
            weight, error = ([sum(column) for column in zip(*(c[key] for c in counts), strict=True)] for key in ("weight", "error"))
            made.append(Histogram(kind, weight, error, _rms([layer.record.get("weight_error") for layer in members])))
    return made


def notes(layers: list[Layer]) -> list[tuple[str, str]]:
    """Every note and the layers that it is about; notes of experts that differ in numbers alone become one, with the range of each number."""
    found: dict[tuple, list[tuple[str, Layer]]] = {}
    for layer in layers:
        for note in layer.record.get("notes", []):
            key = ("experts", NUMBER.sub("#", note)) if layer.expert is not None else ("one", note)
            found.setdefault(key, []).append((note, layer))
    return [(_merged([note for note, _ in entries]), where([layer for _, layer in entries])) for entries in found.values()]


NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)")


def _merged(texts: list[str]) -> str:
    columns = zip(*(NUMBER.findall(text) for text in texts), strict=True)
    spans = iter([_span(sorted(set(column), key=float)) for column in columns])
    return NUMBER.sub(lambda _: next(spans), texts[0])


def _span(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def where(layers: list[Layer]) -> str:
    """q_proj of blocks 0–29; experts 3, 5 of block 0."""
    dense: dict[str, list[int]] = {}
    experts: dict[int, list[int]] = {}
    words = []
    for layer in layers:
        if layer.expert is not None:
            experts.setdefault(_number(layer.block), []).append(layer.expert)
        elif layer.block is not None:
            dense.setdefault(layer.kind, []).append(layer.block)
        else:
            words.append(layer.kind)
    words += [f"{kind} of block{'s' if len(blocks) > 1 else ''} {ranges(blocks)}" for kind, blocks in dense.items()]
    words += [f"block {block}: expert{'s' if len(set(found)) > 1 else ''} {ranges(found)}" for block, found in sorted(experts.items())]
    return "; ".join(words)


def expert_tokens(layers: list[Layer]) -> dict[int, dict[int, tuple[int, bool]]]:
    """Block -> expert -> (calibration tokens seen, whether these are fewer than the inputs of one of its matrices); empty without experts or data."""
    experts = [layer for layer in layers if layer.expert is not None]
    if not any("tokens" in layer.record for layer in experts):
        return {}
    table: dict[int, dict[int, tuple[int, bool]]] = {}
    for layer in experts:
        seen = layer.record.get("tokens", 0)
        row, expert = table.setdefault(_number(layer.block), {}), _number(layer.expert)
        before, scarce = row.get(expert, (seen, False))
        row[expert] = (min(seen, before), scarce or seen < layer.record["shape"][1])
    return table
