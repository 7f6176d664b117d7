"""Makes llm_int8.safetensors: LLM.int8() on the CPU by bitsandbytes itself.

    pip install bitsandbytes==0.50.2 && python tests/oracles/make_llm_int8.py

codes = round_half_even(float16(x) * (127 / s)) in float32, s = the row's max|float16(x)|; a row of zeros has s = 0 and codes of 0 (from NaN, on x86).
With a threshold t an outlier is an entry with |x| >= t. Outlier entries, not their columns, are set to 0 before s is taken; then whole columns that
hold an outlier get codes of 0 (unless there is only one row) and those columns of x in its own dtype multiply the weight columns decoded from their int8
codes, (code * s) * 7.874015718698502e-3 rounded to x's dtype. The float16 weight is not kept.
The rest is float32(int32 sums) * (s_x * s_w) * 6.200124e-5 + bias, rounded to x's dtype, to which the outlier product is added (addmm in x's dtype).
That constant is a slip, 1 / 127^2 is 6.200012e-5 and CUDA's kernel has that: 0.50.2's CPU products are 1.8e-5 too large. CUDA decodes the outlier
columns of the weight from int8 too, and rounds the int8 part to float16 whatever x's dtype is.
In training mode on a CPU nothing of x is quantized, hence eval().
Planted: W row 3 has ties, row 4 is 0; X row 5 is 0; columns 17, 60, 131 hold outliers, 131 by one entry of exactly 6, 90 comes close; rows from 30 have none.
"""

from pathlib import Path

import torch
from bitsandbytes import functional as F
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import save_file


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    W, bias, X = (torch.randn(*shape, generator=generator) for shape in ((96, 160), (96,), (40, 160)))
    W, bias, X = 0.05 * W * torch.logspace(-1, 1, 96).unsqueeze(1), 0.1 * bias, X.clamp(-5.5, 5.5)
    W[3] = 0
    W[3, :9] = torch.tensor([254, 1, 3, 5, -1, -3, -5, 7, -253]) / 256  # times 127 / s is exact and ends with .5
    W[4], X[5] = 0, 0
    X[:30, 17] = 12 * torch.randn(30, generator=generator)
    X[:30:3, 60] = -20 - 5 * torch.rand(10, generator=generator)
    X[8, 131], X[9, 90], X[32, 17] = 6.0, -5.99, 3.0
    tensors = {"W": W, "bias": bias, "X": X}
    tensors["W.codes"], tensors["W.stats"], _ = F.int8_vectorwise_quant(W.half())
    tensors["W.decoded"] = F.int8_vectorwise_dequant(tensors["W.codes"], tensors["W.stats"])
    for threshold in (0, 6):
        codes, stats, columns = F.int8_vectorwise_quant(X.half(), threshold=float(threshold))
        tensors |= {f"X.{threshold}.codes": codes, f"X.{threshold}.stats": stats}
        if columns is not None:
            tensors[f"X.{threshold}.columns"] = columns
        for dtype in (torch.float16, torch.float32):
            layer = Linear8bitLt(160, 96, has_fp16_weights=False, threshold=float(threshold))
            layer.weight.data, layer.bias.data = W.clone(), bias.clone()
            layer = layer.to("cpu").eval()  # this quantizes the weight
            with torch.no_grad():
                tensors[f"Y.{threshold}.{str(dtype)[6:]}"] = layer(X.to(dtype))
                tensors[f"Y.{threshold}.{str(dtype)[6:]}.one"] = layer(X[8:9].to(dtype))  # a row alone: its own outliers only
            assert torch.equal(layer.weight.data, tensors["W.codes"]) and layer.weight.dtype == torch.int8
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(__file__).with_name("llm_int8.safetensors"))


if __name__ == "__main__":
    main()
