"""Errors of the operator in each dtype against float64, beside those of the ways in which others round.

    python -m benchmarks.precision [--device cpu|cuda]

The encoder's shape of benchmarks.op, white noise for features: relative errors in the L2 norm, of the output and, for
the operator, of the gradients. The ways of others are float64 arithmetic in which only what the row names is rounded:
the least that such an implementation errs. bfloat16, and float16 on GPUs.
Writes docs/results/op.{json,md}, or on a GPU docs/results/gpu-op.{json,md}.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.op import SIZES_HW, TITLE, TITLE_ON_GPU, S, arguments, name_of
from benchmarks.results import write
from ops import compiled, reference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = torch.device(parser.parse_args().device)
    exact = [tensor.to(device, torch.float64) for tensor in arguments(S, torch.float32)]
    low = [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.bfloat16]
    others = [{"rounded": row, **errors} for row, errors in of_others(exact, [torch.bfloat16, torch.float16]).items()]
    result = {"operator": of_operator(exact, [torch.float64, torch.float32, *low]), "others": others}
    name, title = ("op", TITLE) if device.type == "cpu" else ("gpu-op", TITLE_ON_GPU)
    write(name, title, "relative errors against float64", result, f"python -m benchmarks.precision --device {device}")
    return 0


def of_others(exact: list[Tensor], dtypes: list[torch.dtype]) -> dict[str, dict[str, float]]:
    """Errors of the output where arithmetic is float64 and some numbers have been rounded: {row: {dtype: error}}."""
    value, references, offsets, logits = exact
    locations, weights = reference.sampling(references, offsets, logits, SIZES_HW, torch.float64)
    sizes_wh = value.new_tensor([(width, height) for height, width in SIZES_HW])[:, None]
    truth = attend(value, locations, weights)

    def errors(rounding) -> dict[str, float]:
        return {name_of(dtype): relative(rounding(dtype), truth) for dtype in dtypes}

    def with_value_and_weights(dtype: torch.dtype, locations: Tensor) -> Tensor:
        return attend(rounded(value, dtype), locations, rounded(weights, dtype))

    def coordinates_in(dtype: torch.dtype) -> Tensor:
        pixels = rounded(locations, dtype).to(dtype) * sizes_wh.to(dtype) - 0.5
        return (pixels.double() + 0.5) / sizes_wh

    def from_offsets(dtype: torch.dtype) -> Tensor:
        return reference.sampling_locations(references, rounded(offsets, dtype), SIZES_HW)

    return {
        "output only": errors(lambda dtype: rounded(truth, dtype)),
        "value and weights": errors(lambda dtype: with_value_and_weights(dtype, locations)),
        "and offsets in pixels": errors(lambda dtype: with_value_and_weights(dtype, from_offsets(dtype))),
        "and locations in [0, 1]": errors(lambda dtype: with_value_and_weights(dtype, rounded(locations, dtype))),
        "and all of the coordinates' arithmetic": errors(
            lambda dtype: with_value_and_weights(dtype, coordinates_in(dtype))
        ),
    }


def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return reference.ms_deform_attn(value, SIZES_HW, locations, weights)


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(dtype).double()


def of_operator(exact: list[Tensor], dtypes: list[torch.dtype]) -> list[dict[str, Any]]:
    """Errors of output and gradients: value in each dtype; with it offsets and logits too, as autocast gives them."""
    truth = results(reference, exact)
    rows = []
    for dtype in dtypes:
        compute = reference.compute_dtype(exact[0].to(dtype))
        given = {"value": [exact[0].to(dtype), *(tensor.to(compute) for tensor in exact[1:])]}
        if dtype != compute:
            given["value, offsets, logits"] = [
                exact[0].to(dtype), exact[1].to(compute), exact[2].to(dtype), exact[3].to(dtype)
            ]  # fmt: skip
        for what, tensors in given.items():
            errors = map(relative, results(compiled, tensors), truth)
            names = ("output", "gradient of value", "of offsets", "of logits")
            rows.append({"in the dtype": what, "dtype": name_of(dtype)} | dict(zip(names, errors, strict=True)))
    return rows


def results(implementation: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of value, offsets and logits for white noise as the output's gradient."""
    value, references, offsets, logits = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
    out = implementation.fused_ms_deform_attn(leaves[0], SIZES_HW, references, *leaves[1:])
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, noise.to(out))]


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


if __name__ == "__main__":
    sys.exit(main())
