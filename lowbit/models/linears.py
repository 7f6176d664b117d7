"""The matrices of a block that can be quantized: linear layers, GPT-2's transposed Conv1D, and single experts of fused ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..tensor import matrix_shape
from .experts import check_experts, is_experts
from .skeleton import Skeleton


@dataclass(frozen=True)
class Linear:
    """One matrix [out_features, in_features] of a block.

    name: the checkpoint's name of the weight (a recipe's rules match it). module: path inside the block. parameter: its attribute.
    expert and rows: its place in a fused parameter [experts, rows, in_features]. transposed: stored [in, out] (Conv1D; of experts the whole stack [experts, in, out]).
    """

    name: str
    module: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def input_key(self) -> tuple[str, str, int | None]:
        """What identifies the input this matrix multiplies, within a block."""
        return self.module, self.parameter, self.expert


def find_linears(skeleton: Skeleton, index: int) -> list[Linear]:
    """All matrices of block index, in the order of its modules."""
    block, prefix = skeleton.blocks[index], skeleton.block_name(index)
    found: list[Linear] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            found.append(_plain(skeleton, prefix, name, module))
        elif is_experts(module):
            check_experts(module, f"{prefix}.{name}")
            for parameter in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                found += _experts(skeleton, prefix, name, parameter, getattr(module, parameter))
    return found


def _plain(skeleton: Skeleton, prefix: str, name: str, module: nn.Linear | Conv1D) -> Linear:
    source = skeleton.sources[f"{prefix}.{name}.weight"]
    if source.converter is not None:
        raise ModelError(f"{prefix}.{name}: its weight is joined from {len(source.flat())} tensors of the checkpoint, which cannot be quantized one by one yet.")
    transposed = isinstance(module, Conv1D)
    shape = matrix_shape(module.weight.shape)
    return Linear(source.flat()[0], name, "weight", shape[::-1] if transposed else shape, transposed=transposed)


def _experts(skeleton: Skeleton, prefix: str, name: str, parameter: str, fused: nn.Parameter) -> list[Linear]:
    source = skeleton.sources[f"{prefix}.{name}.{parameter}"]
    if source.stacked:
        sides = matrix_shape(fused.shape[1:])
        turned = skeleton.model.get_submodule(f"{prefix}.{name}").is_transposed
        shape = sides[::-1] if turned else sides
        return [Linear(key, name, parameter, shape, expert=e, rows=(0, shape[0]), transposed=bool(turned)) for e, key in enumerate(source.flat())]
    if source.converter is None:
        raise ModelError(f"{prefix}.{name}.{parameter}: the checkpoint stores all experts in one tensor of a kind that cannot be quantized one by one yet.")
    experts, _, columns = fused.shape
    shapes = skeleton.checkpoint.shapes()
    found, start = [], 0
    for names in source.names.values():
        rows = shapes[names[0]][0]
        if len(names) != experts or tuple(shapes[names[0]]) != (rows, columns):
            raise ModelError(f"{prefix}.{name}.{parameter}: expected {experts} experts of [*, {columns}] in the checkpoint, found {len(names)} of {list(shapes[names[0]])}.")
        found += [Linear(key, name, parameter, (rows, columns), expert=e, rows=(start, start + rows)) for e, key in enumerate(names)]
        start += rows
    if start != fused.shape[1]:
        raise ModelError(f"{prefix}.{name}.{parameter}: the checkpoint's experts have {start} rows together, the model wants {fused.shape[1]}.")
    return found


def get_weight(block: nn.Module, linear: Linear) -> Tensor:
    """A view of the matrix, [out_features, in_features]."""
    weight = getattr(block.get_submodule(linear.module), linear.parameter).data
    if linear.expert is not None and linear.rows is not None:
        return weight[linear.expert].T if linear.transposed else weight[linear.expert, linear.rows[0] : linear.rows[1]]
    return weight.T if linear.transposed else weight


def set_weight(block: nn.Module, linear: Linear, value: Tensor) -> None:
    """Overwrite the matrix in place with value [out_features, in_features]."""
    get_weight(block, linear).copy_(value)


def outside_matrices(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """Embedding and head (once when tied), by checkpoint name."""
    found = {}
    for module in (skeleton.text.get_input_embeddings(), skeleton.model.get_output_embeddings()):
        for name, other in skeleton.model.named_modules():
            if other is module and f"{name}.weight" in skeleton.sources:
                found[skeleton.sources[f"{name}.weight"].flat()[0]] = matrix_shape(other.get_parameter("weight").shape)
    return found
