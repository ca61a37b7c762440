"""Small sets on disk, to be damaged by tests: in COCO format, and the same in others."""

import copy
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.sample import Sample, read_index, read_manifest

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


def write_voc(folder: Path, annotations: dict) -> None:
    """The same objects as XML files that count pixels from 1, as the VOC devkit does."""
    folder.mkdir()
    names = {one["id"]: one["name"] for one in annotations["categories"]}
    for image in annotations["images"]:
        objects = ""
        for one in (one for one in annotations["annotations"] if one["image_id"] == image["id"]):
            x, y, width, height = one["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
            box = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners.items())
            objects += f"<object><name>{names[one['category_id']]}</name><bndbox>{box}</bndbox></object>\n"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{image['file_name']}</filename>{size}\n{objects}</annotation>"
        (folder / f"{Path(image['file_name']).stem}.xml").write_text(text)


def write_yolo(folder: Path, annotations: dict) -> None:
    """The same objects as text labels with six decimals, and classes.txt; no file for images without objects."""
    folder.mkdir()
    names = {one["id"]: one["name"] for one in annotations["categories"]}
    (folder / "classes.txt").write_text("".join(f"{names[n]}\n" for n in sorted(names)))
    images = {image["id"]: image for image in annotations["images"]}
    for one in annotations["annotations"]:
        image, (x, y, width, height) = images[one["image_id"]], one["bbox"]
        box_px = (x + width / 2, y + height / 2, width, height)
        box = (px / side for px, side in zip(box_px, (image["width"], image["height"]) * 2, strict=True))
        with (folder / f"{Path(image['file_name']).stem}.txt").open("a") as file:
            file.write(" ".join([str(sorted(names).index(one["category_id"])), *(f"{n:.6f}" for n in box)]) + "\n")


def samples(out):
    """All samples of a set, through the index."""
    manifest = read_manifest(out)
    for record in read_index(out, manifest):
        data = (out / manifest.shards[record["shard"]].name).read_bytes()
        image = data[record["image_offset"] :][: record["image_length"]]
        yield image, Sample.from_json(data[record["json_offset"] :][: record["json_length"]])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
