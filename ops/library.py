"""The compiled library `_C.abi3.so`: loading it, and what torch has to know of its operators beyond their kernels.

It is loaded when `ops` is imported. Where it is missing or does not load, importing works all the same, and the first
use of an operator says so.
"""

# B image, S pixel of all levels, M head, E head width, Q query, D = M*E

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("_C.abi3.so")
ISAS = ("avx512", "avx2", "portable")
BUILD = "`python setup.py build_ext --inplace` in the repository"


def check(device: torch.device) -> None:
    """Raise RuntimeError unless the operators can run on this device."""
    if _problem:
        raise RuntimeError(f"{_problem}; TENFOLD_OP=reference does without, in plain torch, many times slower")
    if device.type == "cuda" and not CUDA_ARCHS:
        raise RuntimeError(
            f"value: on {device}, but the library was built without CUDA kernels: where nvcc is on the PATH or"
            f" CUDA_HOME is set, {BUILD} builds them; TENFOLD_OP=reference does without"
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"value: on {device}, expected cpu or cuda; TENFOLD_OP=reference runs anywhere")


def choose_cpu_isa(isa: str = "") -> str:
    """Use the CPU kernels of one instruction set from now on (the widest for ""), and say which that is.

    For tests and benchmarks; the environment variable TENFOLD_CPU_ISA does the same at the start.
    """
    if isa and isa not in ISAS:
        raise ValueError(f"TENFOLD_CPU_ISA: {isa!r}, expected one of {', '.join(ISAS)}")
    check(torch.device("cpu"))
    chosen = _functions.tenfold_choose_cpu_isa(isa.encode())
    if chosen is None:
        raise ValueError(f"TENFOLD_CPU_ISA: {isa!r}, which this machine does not run")
    return chosen.decode()


def sum_pixels_on_gpu(allowed: bool) -> None:
    """Whether the CUDA backward of an encoder sums inside a block what goes to one pixel, which it does from the start.

    For tests and benchmarks.
    """
    _functions.tenfold_sum_pixels(allowed)


def _load() -> tuple[ctypes.CDLL, str]:
    torch.ops.load_library(str(PATH))
    functions = ctypes.CDLL(str(PATH))
    functions.tenfold_choose_cpu_isa.restype = functions.tenfold_cuda_archs.restype = ctypes.c_char_p
    return functions, functions.tenfold_cuda_archs().decode()


def _register(name: str, fake, fake_backward, backward) -> None:
    torch.library.register_fake(f"tenfold::{name}", fake)
    torch.library.register_fake(f"tenfold::{name}_backward", fake_backward)
    torch.library.register_autograd(f"tenfold::{name}", backward, setup_context=_save)
    torch.library.register_autograd(f"tenfold::{name}_backward", _refuse_double_backward)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError("ms_deform_attn: double backward is not implemented; TENFOLD_OP=reference has it")


def _fake(value: Tensor, spatial_shapes: list[int], *others: Tensor) -> Tensor:
    B, _, M, E = value.shape
    return value.new_empty(B, others[-1].shape[1], M * E)


def _fake_backward(grad: Tensor, value: Tensor, spatial_shapes: list[int], *rest) -> tuple[Tensor, ...]:
    *others, _deterministic = rest
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, *others))


def _fake_fused_backward(
    grad: Tensor, value: Tensor, spatial_shapes: list[int], references: Tensor, *rest
) -> tuple[Tensor, ...]:
    offsets, logits, references_too, _deterministic = rest
    grad_references = references.new_empty(references.shape if references_too else (0,))
    grad_value = value.new_empty(value.shape)
    return grad_value, grad_references, offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


def _backward(ctx, grad_BQD: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    grad_value, *grads = torch.ops.tenfold.ms_deform_attn_backward(
        grad_BQD, value, ctx.spatial_shapes, *others, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, None, *grads


def _fused_backward(ctx, grad_BQD: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    references_too = ctx.needs_input_grad[2]
    grad_value, grad_references, *grads = torch.ops.tenfold.fused_ms_deform_attn_backward(
        grad_BQD, value, ctx.spatial_shapes, *others, references_too, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, None, grad_references if references_too else None, *grads


CUDA_ARCHS = ""
_problem = ""  # why there are no kernels
try:
    if PATH.exists():
        _functions, CUDA_ARCHS = _load()
    else:
        _problem = f"{PATH.name} of the package ops is missing: `make build`, or {BUILD}, builds it"
except OSError as error:
    _problem = f"{PATH.name} does not load beside torch {torch.__version__}: {error}; {BUILD} renews it"
if not _problem:
    choose_cpu_isa(os.environ.get("TENFOLD_CPU_ISA", ""))
    _register("ms_deform_attn", _fake, _fake_backward, _backward)
    _register("fused_ms_deform_attn", _fake, _fake_fused_backward, _fused_backward)
    torch.library.register_fake("tenfold::dropout", lambda *arguments: None)
    torch.library.register_fake("tenfold::assign", lambda cost, image, images: image.new_empty(cost.shape[:2]))
