"""Mixtures against llama-quantize: the type of every tensor of twenty-odd models (oracles/mixtures.json, see make_mixtures.py)."""

import json
from functools import cache
from pathlib import Path

import pytest

from lowbit.checkpoints import gguf, gguf_arch, gguf_mixtures
from lowbit.numerics import ggml
from lowbit.pipeline import plan, recipes

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "mixtures.json").read_text(encoding="utf-8"))
FTYPES = {
    "q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_0": 2, "q4_1": 3, "q4_k_s": 14, "q4_k_m": 15, "q5_0": 8, "q5_1": 9,
    "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "q8_0": 7, "iq4_nl": 25, "iq4_xs": 30, "tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38,
}  # fmt: skip


@cache
def matrices(model: str) -> tuple[dict, dict]:
    """Linear layers and outside matrices of a model of the oracle, by Hugging Face name."""
    read = plan._read(ORACLE[model]["config"])
    return read.linears, read.outside


def expected(model: str, mixture: str, *, weighted: bool) -> dict[str, str]:
    """GGUF name without .weight -> type."""
    entry, layers = ORACLE[model], next(ORACLE[model]["config"][key] for key in ("num_hidden_layers", "n_layer") if key in ORACLE[model]["config"])
    found = {}
    for leaf, text in {**entry["types"][mixture], **(entry["weighted"].get(mixture, {}) if weighted else {})}.items():
        most, *others = text.split()
        names = [leaf] if leaf in ("token_embd", "output") else [f"blk.{i}.{leaf}" for i in range(layers)]
        found |= dict.fromkeys(names, most)
        for other in others:
            kind, _, spans = other.partition(":")
            for span in spans.split(","):
                first, _, last = span.partition("-")
                found |= {f"blk.{i}.{leaf}": kind for i in range(int(first), int(last or first) + 1)}
    return found


def by_place(model: str, types: dict[str, str]) -> dict[str, str]:
    """The types by GGUF name; all experts of a stack have one."""
    arch, found = gguf_arch.find(ORACLE[model]["config"]), {}
    for name, kind in types.items():
        place = gguf_arch.place(arch, name).name.removesuffix(".weight")
        assert found.setdefault(place, kind) == kind, name
    theirs = {"float16": "f16", "ggml_mxfp4": "mxfp4"}  # llama-quantize's names of these
    return {place: theirs.get(kind, kind) for place, kind in found.items() if "ffn_gate_inp" not in place}


def test_the_oracle_has_all_mixtures_and_knows_layers_apart():
    assert set(gguf_mixtures.MIXTURES) == set(FTYPES)
    assert {name: mixture.file_type for name, mixture in gguf_mixtures.MIXTURES.items()} == FTYPES
    assert expected("Llama 3 8B", "q4_k_m", weighted=False)["blk.4.ffn_down"] == "q4_k"
    assert expected("Llama 3 8B", "q4_k_m", weighted=False)["blk.6.ffn_down"] == "q6_k"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("model", ORACLE)
def test_every_tensor_has_llama_quantizes_type(model, weighted):
    linears, outside = matrices(model)
    for mixture in gguf_mixtures.known():
        recipe = recipes.settle(recipes.parse(f"{mixture}-weighted-rtn" if weighted else mixture, target_name="gguf"), linears, "bfloat16")[0]
        plans = recipes.resolve(recipe, linears, outside, ORACLE[model]["config"])
        chosen = by_place(model, {name: one.scheme.format for name, one in plans.items()})
        assert chosen == expected(model, mixture, weighted=weighted), mixture


@pytest.mark.parametrize("model", [model for model, entry in ORACLE.items() if entry["config"].get("hidden_size", 768) % 256 == 0])
def test_rules_choose_alike_before_rows_are_looked_at(model):
    """Of models whose rows every block divides."""
    linears, outside = matrices(model)
    for mixture in gguf_mixtures.MIXTURES:
        for weighted in (False, True):
            types = gguf_mixtures.types(mixture, ORACLE[model]["config"], {**linears, **outside}, weighted=weighted)
            assert by_place(model, types) == expected(model, mixture, weighted=weighted), mixture


def test_mixtures_are_offered_where_their_types_are_encoded():
    known = gguf_mixtures.known()
    assert {"q2_k", "q4_k_m", "q8_0", "iq4_xs", "mxfp4_moe"} <= set(known) == {name for name in FTYPES if gguf_mixtures.MIXTURES[name].type in ggml.BLOCK_TYPES}
    assert all(name in recipes.PRESETS for name in known)
    assert gguf.fallback("q6_k", 80) == "float16"
