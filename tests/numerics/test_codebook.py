"""NF4 and FP4 against bitsandbytes (tests/oracles/make_bitsandbytes.py), bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import RecipeError
from lowbit.numerics import bits_per_weight, codebook, dequantize, quantize, scheme_of
from lowbit.scheme import Scheme

ORACLE = load_file(Path(__file__).parent.parent / "oracles" / "bitsandbytes.safetensors")


@pytest.mark.parametrize("matrix", ["a", "b"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_magnitudes_and_values_are_those_of_bitsandbytes(matrix, kind):
    made = quantize(ORACLE[matrix], scheme_of(kind))
    key = f"{matrix}.{kind}.plain"
    assert torch.equal(made.parts["absmax"].view(-1), ORACLE[f"{key}.absmax"])
    assert torch.equal(made.parts["codes"], ORACLE[f"{key}.codes"])
    assert torch.equal(dequantize(made), ORACLE[f"{key}.decoded"])


@pytest.mark.parametrize("matrix", ["a", "b"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_is_that_of_bitsandbytes(matrix, kind):
    made = quantize(ORACLE[matrix], scheme_of(kind, nested=256))
    key = f"{matrix}.{kind}.nested"
    assert torch.equal(made.parts["codes"], ORACLE[f"{key}.codes"])
    assert torch.equal(made.parts["absmax_codes"], ORACLE[f"{key}.absmax"])
    assert torch.equal(made.parts["nested_absmax"], ORACLE[f"{key}.nested_absmax"])
    assert torch.equal(made.parts["nested_offset"], ORACLE[f"{key}.offset"])
    assert torch.equal(dequantize(made), ORACLE[f"{key}.decoded"])


def test_tables():
    assert torch.equal(codebook.table("nf4"), ORACLE["nf4.values"])
    assert torch.equal(codebook.dynamic_table(), ORACLE["dynamic.values"])
    assert torch.equal(codebook.table("fp4").abs(), ORACLE["fp4.values"].abs())


def test_any_block_and_bits():
    W = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    for size in (16, 32, 96):
        made = quantize(W, scheme_of("nf4", block=(1, size)))
        assert made.parts["absmax"].shape == (8, 96 // size)
    assert bits_per_weight(scheme_of("nf4"), (4096, 4096)) == 4.5
    assert bits_per_weight(scheme_of("nf4", nested=256), (4096, 4096)) == pytest.approx(4.127, abs=1e-3)  # QLoRA, section 3: 0.127 bits a parameter


def test_bad_schemes_are_refused():
    with pytest.raises(RecipeError, match="blocks of consecutive weights"):
        Scheme("nf4", 4, (1, -1))
    with pytest.raises(RecipeError, match="nested is 1"):
        Scheme("nf4", 4, (1, 64), nested=1)
