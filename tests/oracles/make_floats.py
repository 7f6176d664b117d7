"""Makes floats.safetensors: roundings to E2M1, E2M3, E3M2, E4M3 and E5M2 by ml_dtypes (what JAX and onnx use), values that saturate left out.

    pip install ml_dtypes==0.6.0 && python tests/oracles/make_floats.py
"""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ELEMENTS = {"e2m1": ml_dtypes.float4_e2m1fn, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def main() -> None:
    generator = np.random.default_rng(0)
    tensors = {}
    for name, dtype in ELEMENTS.items():
        top = float(ml_dtypes.finfo(dtype).max)
        x = np.concatenate([generator.normal(size=2000) * top / 3, generator.normal(size=500) * top / 300, np.linspace(-top, top, 1025), np.zeros(2), [-0.0]]).astype(np.float32)
        x = x[np.abs(x) <= top]
        tensors[f"{name}.x"], tensors[f"{name}.rounded"] = x, x.astype(dtype).astype(np.float32)
        tensors[f"{name}.codes"] = x.astype(dtype).view(np.uint8)
    save_file(tensors, Path(__file__).with_name("floats.safetensors"))


if __name__ == "__main__":
    main()
