"""The GPU kernels in Triton's interpreter (a process of its own: it must be chosen before triton is imported) against products of the decoded matrix."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
PRODUCTS = """
import torch
from lowbit import numerics
from lowbit.errors import FormatError
from lowbit.kernels.triton import MANY, matmul8, pack_gpu, pack_int8
from lowbit.models.quantized import QuantLinear
from lowbit.pipeline import recipes
from lowbit.scheme import Activation, Rounding

FORMATS = (
    "int2-asym-g64", "int3-asym-g64", "int3-sym-g32", "int4-asym-g64", "int4-sym-g64", "int4-asym-g64-hqq", "int5-asym-g64", "int6-sym-g64", "int8-sym-channel", "int8-asym-g64", "nf4", "nf4-dq",
    "fp4", "mxfp4", "nvfp4", "binary", "ternary", "q4_0", "q4_1", "q5_0", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs", "tq2_0",
)
torch.manual_seed(0)
for name in FORMATS:
    scheme = recipes.parse(name if name.endswith("hqq") or name in ("binary", "ternary") else f"{name}-rtn").recipe.scheme
    qt = numerics.quantize(torch.randn(70, 256) * 0.05 + 0.01, scheme)
    W, goal = pack_gpu(qt, torch.device("cpu")), numerics.dequantize(qt)
    tolerance = 1.5e-3 if name.endswith("_k") or name == "iq4_xs" else 1e-6  # k-quants' products of scales are kept in float16
    assert float((W.dequantize() - goal).abs().max()) <= tolerance * float(goal.abs().max()), name
    decoded = W.dequantize()
    for rows, dtype in ((1, torch.float32), (3, torch.float16), (40, torch.float32)):
        x = torch.randn(rows, 256).to(dtype)
        y = W.matmul(x)
        exact = x.double() @ decoded.to(dtype).double().T
        assert y.dtype == dtype and y.shape == (rows, 70)
        assert float((y.double() - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 2e-3), (name, rows, dtype)
    print(name, flush=True)
x = torch.randn(2, 5, 256)
assert torch.equal(W.matmul(x).view(10, -1), W.matmul(x.view(10, 256))) and W.matmul(torch.randn(MANY, 256)).shape == (MANY, 70)
for name in ("int4-sym-g8", "e8p2-ldlq", "fp8-channel-rtn"):
    try:
        pack_gpu(numerics.quantize(torch.randn(64, 64), recipes.parse(name).recipe.scheme), torch.device("cpu"))
    except FormatError as error:
        print(error)
    else:
        raise SystemExit(f"{name} was taken")
a, b = torch.randint(-127, 128, (5, 100), dtype=torch.int8), torch.randint(-127, 128, (70, 100), dtype=torch.int8)
sa, sb = torch.rand(5), torch.rand(70)
goal = (a.double() @ b.double().T) * sa[:, None].double() * sb.double()
assert torch.allclose(matmul8(a, b, sa, sb, torch.float32).double(), goal, rtol=1e-6)
W = numerics.quantize(torch.randn(70, 96), recipes.parse("int8-sym-channel-rtn").recipe.scheme)
rounding = Rounding(Activation())
found, x = pack_int8(W, rounding.act, torch.device("cpu")), torch.randn(2, 5, 96)
assert torch.equal(found.dequantize(), numerics.dequantize(W))
assert torch.allclose(found.matmul(x), QuantLinear(W, rounding=rounding)(x), rtol=1e-5, atol=1e-5)
print("done")
"""


def test_products_are_those_of_the_decoded_matrix():
    made = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert made.returncode == 0 and made.stdout.endswith("done\n"), made.stdout + made.stderr[-3000:]
