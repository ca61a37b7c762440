"""Work of one forward pass at 800 x 1333 for each published variant, beside the paper's figures.

    python -m benchmarks.flops

Convolutions and matrix products are counted by torch's flop counter. The sampling of deformable attention, which that
counter does not know, is added by a formula of its own: `sampling_macs`.
The paper's "GFLOPs" (Zhu et al. 2021, Table 1) are multiplications with their addition counted once, GMAC here, and
means over the first 100 images of val2017 (Carion et al. 2020), many of which are 4:3, hence the second size.
Writes docs/results/flops.{json,md}.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import ROOT, write
from framework import config as configuration
from framework.models.build import ModelConfig, build_detector
from ops import MSDeformAttn
from ops.linear import has_onednn

SIZES_HW = ((800, 1333), (800, 1066))
PAPER = {  # Zhu et al. 2021, Table 1; single scale is not in it
    "coco_r50_deformable": 173.0,
    "coco_r50_deformable_box_refine": 173.0,
    "coco_r50_deformable_two_stage": 173.0,
    "coco_r50_detr": 86.0,
    "coco_r50_detr_dc5": 187.0,
}

NOTE = (
    "the parts are those at 800 x 1333. The paper's figures are means over the first 100 images of val2017, resized to "
    "a short side of 800 and at most 1333: smaller than 800 x 1333, and many of them 800 x 1066"
)


def onednn_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Of a linear layer by oneDNN, which torch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for path in sorted((ROOT / "configs").glob("coco_*.yaml")):
        rows.append(row_of(path))
        print(rows[-1], flush=True)
    result = {"variants": rows, "how to read it": NOTE}
    write("flops", "Work of one forward pass, GMAC", "variants", result, "python -m benchmarks.flops")
    return 0


def row_of(path: Path) -> dict[str, Any]:
    """The parts at the largest size, all of it at each size, and the paper's figure."""
    model = configuration.load(path, []).model
    by_size = [{name: count / 1e9 for name, count in macs(model, size).items()} for size in SIZES_HW]
    sums = {f"{h} x {w}": round(sum(parts.values()), 1) for (h, w), parts in zip(SIZES_HW, by_size, strict=True)}
    parts = {name: round(giga, 1) for name, giga in by_size[0].items()}
    return {"config": path.stem} | parts | sums | {"paper": PAPER.get(path.stem)}


def macs(config: ModelConfig, size_hw: tuple[int, int]) -> dict[str, float]:
    """Multiply-adds of one unpadded image, by part of the detector; the sampling stands apart."""
    sampled: list[float] = []
    model = build_detector(config).requires_grad_(False)
    model.train()  # in eval mode torch takes a path that its counter does not know
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.register_forward_hook(lambda m, inputs, _: sampled.append(sampling_macs(m, inputs[0].shape[1])))
    known = {torch.ops.mkldnn._linear_pointwise: onednn_flops} if has_onednn() else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model(torch.zeros(1, 3, *size_hw), torch.zeros(1, *size_hw, dtype=torch.bool))
    macs = {name: sum(counts.values()) / 2 for name, counts in counter.get_flop_counts().items()}
    parts = {part: macs.get(f"Detector.{part}", 0.0) for part in ("backbone", "encoder", "queries", "decoder")}
    parts["projections"] = macs["Global"] - sum(parts.values())
    return parts | {"sampling": sum(sampled)}


def sampling_macs(module: MSDeformAttn, num_queries: int) -> float:
    """For each channel of a point its four corners; for each point 16 more.

    Those: location and pixel 4, corner weights 4, times the attention weight 4, softmax 4.
    """
    points = num_queries * module.num_heads * module.num_levels * module.num_points
    channels = module.value_proj.out_features // module.num_heads
    return points * (4 * channels + 16)


if __name__ == "__main__":
    sys.exit(main())
