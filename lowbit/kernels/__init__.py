"""Fast arithmetic on packed matrices, in the C++ extension (csrc/, loaded by lowbit/native.py) or on a GPU.

    packed.py      any quantized matrix in the layout that it streams
    attention.py   attention over whole texts in bfloat16, with gradients
    decode.py      packed matrices to numbers
    triton.py      products on a GPU (imported where there is one, or by name)
    reference.py   what its products are, in plain torch: the oracle of the tests
"""

from ..native import instruction_sets, native, why_not
from .packed import PackedMatrix, can_pack, pack

__all__ = ["PackedMatrix", "can_pack", "instruction_sets", "native", "pack", "why_not"]
