"""Make gptq.safetensors with the authors' own code: what their inner loop makes of the same W and H.

    git clone https://github.com/IST-DASLab/gptq  &&  python tests/oracles/make_gptq.py gptq/

Their code finds a group's scale from weights that are stale within a block of columns; with blocksize = groupsize a group begins a block
and the scale is fresh, so those cases can be compared. Scales are symmetric max|x| / 7.5 or asymmetric over a range that includes 0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS, TOKENS = 24, 96, 400
CASES = [  # name, bits, symmetric, group size (-1: row), act order with static groups
    ("int4-sym-g32", 4, True, 32, False),
    ("int4-asym-g32", 4, False, 32, False),
    ("int4-sym-g16", 4, True, 16, False),
    ("int3-asym-row", 3, False, -1, False),
    ("int2-asym-g32", 2, False, 32, False),
    ("int8-sym-row", 8, True, -1, False),
    ("int4-sym-g32-act", 4, True, 32, True),
    ("int3-asym-g32-act", 3, False, 32, True),
]


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import gptq as theirs
    import quant

    torch.cuda.synchronize = lambda: None
    torch.manual_seed(0)
    X = torch.randn(TOKENS, COLUMNS) @ (torch.eye(COLUMNS) + 0.04 * torch.randn(COLUMNS, COLUMNS))
    X[:, 5] = 0  # a dead column
    W = torch.randn(ROWS, COLUMNS)
    made = {"W": W, "H": (2 / TOKENS) * X.T @ X}
    for name, bits, symmetric, size, act in CASES:
        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight.data = W.clone()
        run = theirs.GPTQ(layer)
        run.H, run.nsamples = made["H"].clone(), TOKENS
        run.quantizer = quant.Quantizer()
        run.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
        run.fasterquant(blocksize=128 if size == -1 else size, percdamp=0.01, groupsize=size, actorder=act, static_groups=act)
        made[name] = layer.weight.data.clone()
    save_file(made, Path(__file__).with_name("gptq.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
