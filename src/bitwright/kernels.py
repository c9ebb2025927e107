"""What a GPU executed, read from the names of its kernels: a layer that was asked for in 8 bits may run in bfloat16 without a word.

The libraries name a matrix product after its operands (``cutlass_80_tensorop_i16832gemm_s8_…``, ``sm90_xmma_gemm_e4m3bf16_…``,
``nvjet_tst_…``), ATen's convolutions after their element type. Kernels that Triton compiled are named after the call that they come
from; their operands are in the code that the compiler wrote. What none of this tells is `UNKNOWN`, and never what was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

Precision = Literal["bf16", "int8", "fp8"]
UNKNOWN = "unknown"
_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|softmax", re.I)
_REDUCTION = re.compile(r"splitk_?reduce|reduce_?splitk|triton_(?:poi|red|per)_", re.I)
_PRODUCT = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|triton_tem_|fprop|conv(?!ert)|matmul", re.I)
_OPERANDS = (
    ("fp8", re.compile(r"e4m3|e5m2|fp8|float8|f8f8|nvjet_(?:sm\d+_)?qq|_scaled_mm", re.I)),
    (
        "int8",
        re.compile(r"(?<![a-z0-9])(?:s8|i8|u8|int8)(?![a-z0-9])|i8i(?:8|32)|i(?:16832|161616|8816)gemm|imma|(?<![a-z])igemm|_int_mm", re.I),
    ),
    ("bf16", re.compile(r"bf16|bfloat16|nvjet_(?:sm\d+_)?t", re.I)),
    ("fp16", re.compile(r"f16|fp16|half|hgemm|nvjet_(?:sm\d+_)?h", re.I)),
    ("tf32", re.compile(r"tf32|s1688(?:gemm|fprop)", re.I)),
    ("float32", re.compile(r"sgemm|scudnn|f32f32|ffma|<float|, float", re.I)),
)
"""By precision, what is in a kernel's name; the narrowest first, since results and sums have wider types than operands."""
_TRITON = {"*i8": "int8", "*u8": "int8", "*fp8e4nv": "fp8", "*fp8e5": "fp8", "*bf16": "bf16", "*fp16": "fp16", "*fp32": "float32"}
_COMPILED = re.compile(r"'signature':\s*\{([^}]*)\}(?:(?!'signature':).)*?\bdef\s+(triton_tem_\w+)\s*\(", re.S)
_ARGUMENT = re.compile(r"'arg_[AB]':\s*'([^']+)'")


def operands_of(code: str) -> dict[str, str]:
    r"""Return the precision of the operands of each matrix product in TorchInductor's code, by kernel; `UNKNOWN` where the two differ.

    >>> operands_of("{'signature': {'arg_A': '*i8', 'arg_B': '*i8', 'out_ptr0': '*bf16'}}\ndef triton_tem_fused_mm_0(arg_A, arg_B):")
    {'triton_tem_fused_mm_0': 'int8'}
    """
    found = {}
    for signature, name in _COMPILED.findall(code):
        kinds = {_TRITON.get(kind, UNKNOWN) for kind in _ARGUMENT.findall(signature)}
        if kinds:
            found[name] = kinds.pop() if len(kinds) == 1 else UNKNOWN
    return found


def precision_of(kernel: str, operands: Mapping[str, str] | None = None) -> str | None:
    """Return the precision of a kernel's operands; None if it is no convolution or matrix product of a layer.

    Args:
        kernel: its name in a profile.
        operands: what `operands_of` read of the compiled code.

    >>> precision_of("void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_128x128_64x4_tn_align16>(Params)")
    'int8'
    >>> precision_of("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"), precision_of("triton_tem_fused_addmm_3")
    ('bf16', 'unknown')
    """
    if operands and kernel in operands:
        return operands[kernel]
    if any(pattern.search(kernel) for pattern in (_ATTENTION, _REDUCTION)) or not _PRODUCT.search(kernel):
        return None
    return next((name for name, pattern in _OPERANDS if pattern.search(kernel)), UNKNOWN)


def executed(kernels: Iterable[str], operands: Mapping[str, str] | None = None) -> Counter[str]:
    """Return how many convolutions and matrix products ran in which precision."""
    found = (precision_of(kernel, operands) for kernel in kernels)
    return Counter(kind for kind in found if kind is not None)


def ran_as(asked: str, found: Mapping[str, int], layers: int = 1) -> bool:
    """Return whether all of a network's layers ran in the precision asked for: that many products at least, and none in another.

    >>> ran_as("int8", {"int8": 4}, 4), ran_as("int8", {"int8": 3, "bf16": 1}, 4), ran_as("fp8", {})
    (True, False, False)
    """
    return set(found) == {asked} and found[asked] >= layers


def unsupported(layer: nn.Module, precision: Precision, capability: tuple[int, int]) -> str | None:
    """Return why nothing runs a convolution or linear layer in a precision on a GPU; None where something may.

    Args:
        layer: a 1x1 convolution of one group counts as a linear layer over pixels.
        precision: wanted.
        capability: CUDA's compute capability of the GPU.
    """
    least = {"bf16": (8, 0), "int8": (8, 0), "fp8": (8, 9)}[precision]
    if capability < least:
        return f"{precision} needs compute capability {least[0]}.{least[1]}, this GPU has {capability[0]}.{capability[1]}"
    if precision == "bf16":
        return None
    if not is_linear(layer) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"torchao has no {precision} kernel for this convolution"
    many = {"int8": 8, "fp8": 16}[precision]
    out, inputs = layer.weight.shape[:2]
    if out % many or inputs % many:
        return f"{precision} products need multiples of {many} features, this layer has {inputs} and {out}"
    return None


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is linear, or a convolution that is a linear layer over the pixels that it reads."""
    if not isinstance(layer, nn.Conv2d):
        return isinstance(layer, nn.Linear)
    return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid")


__all__ = ["UNKNOWN", "executed", "is_linear", "operands_of", "precision_of", "ran_as", "unsupported"]
