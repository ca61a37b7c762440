"""A small set in COCO format on disk, to be damaged by tests."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES_WH = ((40, 30), (30, 40), (24, 24), (64, 20))
COCO = {
    "images": [
        {"id": 10 + n, "file_name": f"photo.{n}.jpg", "width": width, "height": height}
        for n, (width, height) in enumerate(SIZES_WH)
    ],
    "annotations": [
        {"id": 5, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10.5, 20], "area": 150.0, "iscrowd": 0,
         "segmentation": [[1, 2, 11.5, 2, 11.5, 22]]},
        {"id": 6, "image_id": 10, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
        {"id": 2, "image_id": 12, "category_id": 90, "bbox": [4, 4, 8, 8]},
        {"id": 9, "image_id": 13, "category_id": 3, "bbox": [50, 10, 14, 10], "area": 100},
    ],
    "categories": [{"id": 7, "name": "starfish"}, {"id": 90, "name": "stingray"}, {"id": 3, "name": "fish"}],
}  # fmt: skip


def coco() -> dict:
    return copy.deepcopy(COCO)


def pixels(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_set(folder: Path, annotations: object = None, name: str = "instances.json") -> Path:
    """Images and one annotation file (COCO above unless another object, or text, is given) below `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for n, (width, height) in enumerate(SIZES_WH):
        pixels(width, height, n).save(folder / "images" / f"photo.{n}.jpg")
    annotations = COCO if annotations is None else annotations
    text = annotations if isinstance(annotations, str) else json.dumps(annotations)
    (folder / name).write_text(text)
    return folder


def arguments(folder: Path, out: Path, *more: str, name: str = "instances.json") -> list[str]:
    """Of data_tools.convert."""
    return ["--images", str(folder / "images"), "--annotations", str(folder / name), "--out", str(out), *more]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
