"""The largest micro-batch that a GPU of 16, 24, 40, 80 or 141 GB holds: what framework.plan says, and what fits.

    python -m benchmarks.largest_batch [--config FILE ...]

On one GPU, of which no more memory is used than the smaller ones have. Forward, loss and backward of images of 800 x
1066 with the engine's states in memory (bf16, ZeRO 1); what fits is found to 2 %.
Writes docs/results/gpu-largest-batch.{json,md}.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.results import ROOT, write
from benchmarks.train_step import BOXES, SIZE_HW
from framework import config as configuration
from framework.config import Config
from framework.data.batch import blank_batch
from framework.engine.ds_config import deepspeed_config, start_engine
from framework.engine.optimizer import build_optimizer
from framework.engine.ranks import Ranks, init_ranks
from framework.engine.rehearsal import forward
from framework.engine.shares import shares_of
from framework.errors import UsageError, command
from framework.losses.criterion import Criterion
from framework.models.build import build_detector

CONFIGS = [ROOT / "configs" / f"{name}.yaml" for name in ("coco_r50_deformable", "coco_r50_deformable_two_stage")]
SETTINGS = ["engine.precision=bf16", "engine.zero_stage=1", "train.global_batch=1", "train.micro_batch=1",
            f"data.sizes=[{SIZE_HW[0]}]", f"data.max_size={SIZE_HW[1]}"]  # fmt: skip
GRAIN = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=CONFIGS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("no GPU that torch can use: this is about one")
    ranks = init_ranks()
    for path in args.config:
        rows = []
        engine_of = Engine(configuration.load(path, SETTINGS), ranks)
        for gb, expected in predicted(path).items():
            fit = engine_of.most_that_fit(float(gb) * 1e9, expected)
            if fit is not None:
                rows.append({"GB": gb, "predicted": expected, "fit": fit, "predicted of what fits": expected / fit})
                print(path.stem, rows[-1], flush=True)
        said = f"python -m benchmarks.largest_batch --config configs/{path.name}"
        write("gpu-largest-batch", "The largest micro-batch", path.stem, {"GPUs": rows}, said)
        del engine_of
        gc.collect()  # DeepSpeed's is in cycles
    return 0


def predicted(path: Path) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        line = [sys.executable, "-m", "framework.plan", "--config", str(path), "--nodes", "1", "--gpus-per-node", "1"]
        subprocess.run([*line, "--out", str(out), *SETTINGS], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, int] = json.loads(out.read_text())["largest_micro_batch"]
    return found


class Engine:
    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.device = ranks.device
        detector = build_detector(config.model).to(self.device).train()
        self.engine = start_engine(detector, build_optimizer(detector, config.optim, self.device), deepspeed_config(
            config.engine, device=self.device, global_batch=1, micro_batch=1, accumulation=1,
            clip_norm=config.optim.clip_norm,
        ))  # fmt: skip
        shares_of(self.engine)  # makes the moments
        self.criterion = Criterion(config.loss, config.model.classification)
        self.weights = [weight for weight in detector.parameters() if weight.requires_grad]

    def fits(self, images: int) -> bool:
        batch = blank_batch([SIZE_HW] * images, BOXES)
        try:
            torch.autograd.grad(forward(self.engine, self.criterion, batch, self.device), self.weights)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    def most_that_fit(self, of_bytes: float, expected: int) -> int | None:
        """Images; None: this GPU has less than so many bytes."""
        self.fits(1)  # so that CUDA and its libraries have what they take
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        if of_bytes > total:
            return None
        torch.cuda.set_per_process_memory_fraction((of_bytes - others) / total)
        step, images = max(1, round(GRAIN * expected)), expected
        if self.fits(images):
            while self.fits(images + step):
                images += step
        else:
            images -= step
            while images > 0 and not self.fits(images):
                images -= step
        torch.cuda.set_per_process_memory_fraction(1.0)
        return max(images, 0)


if __name__ == "__main__":
    command(main)
