"""Draw a detection set in COCO format: textured shapes that cover one another, on textured ground.

An image is drawn from (seed, train or val, number) alone: the same arguments give the same bytes in any number of
processes (with the same numpy and Pillow; with AVX-512 one image in 60 differs in a few pixels), more images extend
a set, and no training image is ever a validation image.

    ground -> lines, grey shapes, pale blobs (no class) -> 1 to 20 objects, each over the earlier ones

A class is a shape, a texture and a band of hues; ground and distractors are pale or of a foreign shape. Boxes
and areas are of what is visible. Legend: u, v are coordinates of an object, its outline about 1 from the centre.
"""

import argparse
import colorsys
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_tools.commit import commit, is_free, partial_folder
from data_tools.sample import SPLITS
from framework.errors import UsageError, command
from framework.processes import worker_pool
from framework.tracking.console import progress, setup_logging, write_json

EXAMPLE = """example:
  python -m data_tools.synth --out data/shapes --images 1000 --val 200 --size 192
  python -m data_tools.convert --images data/shapes/images --annotations data/shapes/annotations --out shards/shapes"""

# Sizes are sqrt(area) / side x zoom. COCO's limits of 32 and 96 px are 5 % and 15 % of its side of 640.
SMALL, LARGE = 32 / 640, 96 / 640
SMALLEST = 0.035  # below, neither shape nor texture can be seen at 192 px
# Draws (share, lowest, highest). COCO: 41 % small, 34 % medium, 24 % large; covering moves some to the next below.
SIZES = ((0.41, 0.037, 0.049), (0.325, 0.053, 0.145), (0.265, 0.158, 0.34))
MOST_OBJECTS = 20
LEAST_VISIBLE = 0.4  # of each object
NEAR = 0.75  # share of the places that are sought beside an earlier object
COVERED = 0.05  # the hidden part from which an object counts as covered

MARK = ".data_tools.synth"  # tells whose an unfinished folder is

Array = np.ndarray
Field = Callable[[Array, Array], Array]


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 1


def _square(u: Array, v: Array) -> Array:
    return np.maximum(abs(u), abs(v)) - 0.9


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(v, 0.866 * abs(u) - 0.5 * v) - 0.6


def _star(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.8 - 0.35 * np.cos(5 * np.arctan2(v, u))


def _ring(u: Array, v: Array) -> Array:
    return abs(np.hypot(u, v) - 0.75) - 0.27


def _cross(u: Array, v: Array) -> Array:
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.36), np.maximum(u - 0.36, v - 1))


def _bar(u: Array, v: Array) -> Array:
    return np.maximum(abs(u) - 1.2, abs(v) - 0.4)


def _crescent(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 1, 0.75 - np.hypot(u - 0.5, v))


def _blob(u: Array, v: Array) -> Array:
    angle = np.arctan2(v, u)
    return np.hypot(u, v) - 0.8 - 0.15 * np.sin(3 * angle + 1) - 0.12 * np.sin(2 * angle)


def _dots(u: Array, v: Array) -> Array:
    return np.cos(u) * np.cos(v) > 0.2


def _stripes(u: Array, v: Array) -> Array:
    return np.sin(u) > 0


def _checks(u: Array, v: Array) -> Array:
    return np.sin(u) * np.sin(v) > 0


def _rings(u: Array, v: Array) -> Array:
    return np.sin(np.hypot(u, v)) > 0


def _waves(u: Array, v: Array) -> Array:
    return np.sin(u + 1.5 * np.sin(0.8 * v)) > 0


def _plain(u: Array, v: Array) -> Array:
    return np.ones_like(u)


def _shaded(u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.sin(0.3 * u)


@dataclass(frozen=True)
class Kind:
    """A class. shape(u, v): below 0 inside, in about units of u. texture(u, v): 0 dark to 1 bright, period 2 pi."""

    name: str
    shape: Field
    texture: Field
    hue_deg: float


CLASSES = (
    Kind("disc", _disc, _dots, 0),
    Kind("square", _square, _stripes, 115),
    Kind("triangle", _triangle, _checks, 225),
    Kind("star", _star, _rings, 55),
    Kind("ring", _ring, _plain, 300),
    Kind("cross", _cross, _waves, 178),
    Kind("bar", _bar, _stripes, 27),
    Kind("crescent", _crescent, _shaded, 262),
)
HUE_JITTER_DEG = 10
BLOB = Kind("blob", _blob, _shaded, 30)


def _unit_size(kind: Kind) -> float:
    """sqrt(area) of the shape in its own coordinates."""
    u, v = np.meshgrid(*[np.linspace(-1.5, 1.5, 301)] * 2)
    return 3.0 * float(np.sqrt((kind.shape(u, v) < 0).mean()))


UNIT_SIZE = {kind.name: _unit_size(kind) for kind in (*CLASSES, BLOB)}


@dataclass(frozen=True)
class Stencil:
    """Where a shape lies: its window of the image, u and v there, and how deep inside each pixel is, in px."""

    window: tuple[slice, slice]
    u: Array
    v: Array
    depth_px: Array
    mask: Array
    area_px: int
    radius_px: float
    centre_xy_px: Array


@dataclass(frozen=True)
class Drawn:
    """An object as it is visible in the end; hidden: the part that others cover, 0 to 1."""

    label: int
    box_xywh_px: list[int]
    area_px: int
    hidden: float


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    out = Path(args.out).resolve()
    counts = dict(zip(SPLITS, (args.images, args.val), strict=True))
    arguments = counts | {"size": args.size, "classes": args.classes, "seed": args.seed, "zoom": args.zoom}
    if not is_free(out):
        refuse_other_set(out, arguments)
        print(f"{args.out}: already there, drawn with the same arguments")
        return 0
    with partial_folder(out, MARK) as folder, progress(args.images + args.val, description="draw") as bar:
        (folder / "images").mkdir()
        (folder / "annotations").mkdir()
        shares = {}
        for split, count in counts.items():
            first_id = 1 if split == "train" else args.images + 1
            annotations = draw_split(folder / "images", split, count, first_id, args, bar.update)
            shares[split] = composition(annotations, args.size, args.zoom)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
        write_json(folder / "report.json", {"arguments": arguments, "composition": shares})
        commit(folder, out)
    for split, share in shares.items():
        print(f"{split}: {sentence(share)}")
    print(f"{args.out}: images of {args.size} px, {args.classes} classes, annotations in COCO format")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.synth",
        description="Draw a detection set in COCO format: images/, annotations/instances_{train,val}.json.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--images", type=int, required=True, help="number of training images")
    parser.add_argument("--val", type=int, help="number of validation images (a fifth of --images)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (256)")
    parser.add_argument("--classes", type=int, default=6, help=f"number of classes, up to {len(CLASSES)} (6)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set (0)")
    parser.add_argument(
        "--zoom", type=float, default=1.0,
        help="objects so many times COCO's size relative to the image, for small images (1)",
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes that draw ({cores})")
    args = parser.parse_args(argv)
    args.val = max(1, args.images // 5) if args.val is None else args.val
    limits = (("images", 1, 10**9), ("val", 1, 10**9), ("size", 64, 4096), ("classes", 1, len(CLASSES)),
              ("seed", 0, 2**63), ("zoom", 1, 2.5), ("workers", 1, 1024))  # fmt: skip
    for name, low, high in limits:
        if not low <= getattr(args, name) <= high:
            raise UsageError(f"--{name} {getattr(args, name)}: expected {low} to {high}")
    return args


def refuse_other_set(out: Path, arguments: dict[str, int]) -> None:
    """Raises UsageError unless `out` was drawn with these arguments."""
    try:
        found = json.loads((out / "report.json").read_bytes())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out}: exists and is not a drawn set; remove it or choose another --out") from None
    if found != arguments:
        raise UsageError(f"{out}: exists, drawn with {found}; remove it or choose another --out")


def draw_split(
    folder: Path, split: str, count: int, first_id: int, args: argparse.Namespace, drawn: Callable[[], Any]
) -> dict[str, Any]:
    """Write the images of a split; returns their annotations in COCO's format, with the part `hidden` of each."""
    categories = [{"id": n, "name": kind.name} for n, kind in enumerate(CLASSES[: args.classes], 1)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    write = functools.partial(write_image, folder, split, first_id, args)
    with worker_pool(args.workers, "draws images") as pool:
        for number, objects in enumerate(pool.map(write, range(count))):
            image_id = first_id + number
            images.append({"id": image_id, "file_name": name_of(image_id), "width": args.size, "height": args.size})
            annotations += [
                {"id": len(annotations) + n, "image_id": image_id, "category_id": one.label + 1,
                 "bbox": one.box_xywh_px, "area": one.area_px, "iscrowd": 0, "segmentation": [],
                 "hidden": round(one.hidden, 3)}
                for n, one in enumerate(objects, 1)
            ]  # fmt: skip
            drawn()
    info = {"description": f"textured shapes drawn by data_tools.synth, seed {args.seed}, {split}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def name_of(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def write_image(folder: Path, split: str, first_id: int, args: argparse.Namespace, number: int) -> list[Drawn]:
    """Draw image `number` of a split and write it; returns what can be seen on it."""
    rng = np.random.default_rng([args.seed, SPLITS.index(split), number])
    pixels, objects = draw_image(rng, args.size, args.classes, args.zoom)
    # 4:4:4: halved chroma would wash out the hue of what is 8 px wide.
    Image.fromarray(pixels).save(folder / name_of(first_id + number), quality=92, subsampling=0)
    return objects


def draw_image(rng: np.random.Generator, side: int, num_classes: int, zoom: float = 1.0) -> tuple[Array, list[Drawn]]:
    """One image (side, side, 3) uint8 and what can be seen on it."""
    canvas_HW3 = draw_ground(rng, side)
    draw_distractors(rng, canvas_HW3, num_classes, zoom)
    # owner: the number of the object that each pixel shows, -1 for none.
    owner_HW = np.full((side, side), -1)
    labels: list[int] = []
    stencils: list[Stencil] = []
    for _ in range(draw_count(rng)):
        label = int(rng.integers(num_classes))
        stencil = find_place(rng, CLASSES[label], side, zoom, owner_HW, stencils)
        if stencil is not None:
            owner_HW[stencil.window][stencil.mask] = len(stencils)
            paint(rng, canvas_HW3, stencil, CLASSES[label], saturation=rng.uniform(0.75, 1.0))
            labels.append(label)
            stencils.append(stencil)
    pixels = (canvas_HW3 * 255).clip(0, 255).astype(np.uint8)
    return pixels, [seen(owner_HW, n, *one) for n, one in enumerate(zip(labels, stencils, strict=True))]


def draw_count(rng: np.random.Generator) -> int:
    """1 to MOST_OBJECTS, about 7 in the mean, with COCO's long tail."""
    return min(1 + int(rng.gamma(1.7, 3.9)), MOST_OBJECTS)


def draw_ground(rng: np.random.Generator, side: int) -> Array:
    """Pale ground: noise of four scales and a faint wave; (side, side, 3) float32 in 0 to 1."""
    height = np.zeros((side, side), np.float32)
    for cells, strength in ((3, 0.10), (9, 0.07), (30, 0.05)):
        noise = rng.standard_normal((cells, cells), dtype=np.float32) * strength
        height += np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC))
    height += rng.standard_normal((side, side), dtype=np.float32) * np.float32(0.03)
    x, y = np.meshgrid(*[np.arange(side, dtype=np.float32) / side] * 2)
    frequency_x, frequency_y = rng.uniform(-60, 60, 2).astype(np.float32)
    height += np.float32(0.05) * np.sin(frequency_x * x + frequency_y * y)
    base = rgb(rng.uniform(0, 360), rng.uniform(0, 0.22)) * np.float32(rng.uniform(0.25, 0.75))
    return base * (1 + 1.5 * height[:, :, None])


def draw_distractors(rng: np.random.Generator, canvas_HW3: Array, num_classes: int, zoom: float) -> None:
    """What is no class: thin lines of any colour, shapes of the classes in grey, pale blobs."""
    side = len(canvas_HW3)
    layer = Image.fromarray((canvas_HW3 * 255).clip(0, 255).astype(np.uint8))
    for _ in range(rng.integers(4)):
        colour = rgb(rng.uniform(0, 360), rng.uniform(0.3, 1.0)) * rng.uniform(100, 255)
        ends = rng.integers(side, size=4).tolist()
        ImageDraw.Draw(layer).line(ends, tuple(colour.astype(int).tolist()), max(1, side // 160))
    canvas_HW3[:] = np.asarray(layer, dtype=np.float32) / 255
    for _ in range(rng.integers(1, 5)):
        is_blob = rng.random() < 0.4
        kind = BLOB if is_blob else CLASSES[rng.integers(num_classes)]
        stencil = place(rng, kind, side, zoom * rng.uniform(0.04, 0.16), rng.uniform(0, side, 2))
        paint(rng, canvas_HW3, stencil, kind, saturation=rng.uniform(0.1, 0.3) if is_blob else 0.04)


def find_place(
    rng: np.random.Generator, kind: Kind, side: int, zoom: float, owner_HW: Array, earlier: list[Stencil]
) -> Stencil | None:
    """A place that leaves enough of each earlier object, often over the rim of one; None: none was found."""
    share = rng.choice(len(SIZES), p=[share for share, _, _ in SIZES])
    size = zoom * float(np.exp(rng.uniform(*np.log(SIZES[share][1:]))))
    smallest_px = (SMALLEST * zoom * side) ** 2
    visible = np.bincount(owner_HW[owner_HW >= 0], minlength=len(earlier))
    least = [max(LEAST_VISIBLE * one.area_px, smallest_px) for one in earlier]
    for _ in range(20):
        stencil = place(rng, kind, side, size, draw_centre(rng, size * side, side, earlier))
        owners = owner_HW[stencil.window][stencil.mask]
        covered = np.bincount(owners[owners >= 0], minlength=len(earlier))
        if stencil.area_px >= smallest_px and np.all((visible - covered >= least) | (covered == 0)):
            return stencil
    return None


def draw_centre(rng: np.random.Generator, size_px: float, side: int, earlier: list[Stencil]) -> Array:
    """x, y in px: anywhere, or so that the object reaches over the rim of an earlier one."""
    if not earlier or rng.random() > NEAR:
        return rng.uniform(0.5 * size_px, side - 0.5 * size_px, 2)
    near = earlier[rng.integers(len(earlier))]
    distance_px = (near.radius_px + 0.6 * size_px) * rng.uniform(0.4, 0.9)
    angle = rng.uniform(0, 2 * np.pi)
    centre = near.centre_xy_px + distance_px * np.array([np.cos(angle), np.sin(angle)])
    return centre.clip(0.4 * size_px, side - 0.4 * size_px)


def place(rng: np.random.Generator, kind: Kind, side: int, size: float, centre_xy_px: Array) -> Stencil:
    """The stencil of a shape of `size` (sqrt(area) / side), turned and stretched at random."""
    radius_px = size * side / UNIT_SIZE[kind.name]
    angle, stretch = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.2, 0.2))
    low = np.maximum(np.floor(centre_xy_px - 1.75 * radius_px), 0).astype(int)
    high = np.minimum(np.ceil(centre_xy_px + 1.75 * radius_px), side).astype(int)
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    x = ((np.arange(low[0], high[0]) + 0.5 - centre_xy_px[0]) / radius_px).astype(np.float32)
    y = ((np.arange(low[1], high[1]) + 0.5 - centre_xy_px[1]) / radius_px).astype(np.float32)[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (cos * x + sin * y) * np.float32(stretch), (cos * y - sin * x) / np.float32(stretch)
    depth_px = -kind.shape(u, v) * radius_px
    mask = depth_px > 0
    return Stencil(window, u, v, depth_px, mask, int(mask.sum()), radius_px, centre_xy_px)


def paint(rng: np.random.Generator, canvas_HW3: Array, stencil: Stencil, kind: Kind, saturation: float) -> None:
    """Texture inside, a darker rim, edges blended over a pixel."""
    hue_deg = kind.hue_deg + rng.uniform(-HUE_JITTER_DEG, HUE_JITTER_DEG)
    bright = rng.uniform(0.8, 1.0)
    dark = bright * rng.uniform(0.45, 0.65)
    period = max(rng.uniform(0.4, 0.7), 3.5 / stencil.radius_px)  # 3.5 px: finer would be noise
    texture = kind.texture(stencil.u * (2 * np.pi / period), stencil.v * (2 * np.pi / period))
    rim = (stencil.depth_px < min(0.12 * stencil.radius_px, 2.0)) * 0.4
    value = (dark + (bright - dark) * texture) * (1 - rim)
    alpha = (stencil.depth_px + 0.5).clip(0, 1)[:, :, None]
    part = canvas_HW3[stencil.window]
    part += alpha * (value[:, :, None] * rgb(hue_deg, saturation) - part)


def rgb(hue_deg: float, saturation: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue_deg / 360 % 1, saturation, 1.0), np.float32)


def seen(owner_HW: Array, number: int, label: int, stencil: Stencil) -> Drawn:
    """Box and area of the pixels that show the object in the end."""
    top, left = stencil.window[0].start, stencil.window[1].start
    visible = owner_HW[stencil.window] == number
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    area_px = int(visible.sum())
    box = [int(number) for number in (left + columns[0], top + rows[0], width, height)]
    return Drawn(label, box, area_px, 1 - area_px / stencil.area_px)


def composition(coco: dict[str, Any], side: int, zoom: float = 1.0) -> dict[str, float]:
    """What a split consists of, measured on its annotations."""
    size = np.sqrt([one["area"] for one in coco["annotations"]]) / side / zoom
    hidden = np.array([one["hidden"] for one in coco["annotations"]])
    images = [image["id"] for image in coco["images"]]
    counts = np.bincount([one["image_id"] - images[0] for one in coco["annotations"]], minlength=len(images))
    return {
        "images": len(images),
        "objects": len(size),
        "objects_per_image": round(float(counts.mean()), 2),
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "small": round(float((size < SMALL).mean()), 3),
        "medium": round(float(((size >= SMALL) & (size < LARGE)).mean()), 3),
        "large": round(float((size >= LARGE).mean()), 3),
        "covered": round(float((hidden >= COVERED).mean()), 3),
    }


def sentence(share: dict[str, float]) -> str:
    return (
        "{images} images, {objects} objects: {objects_per_image} an image ({fewest} to {most}); small {small:.0%}, "
        "medium {medium:.0%}, large {large:.0%}; partly covered {covered:.0%}"
    ).format(**share)


if __name__ == "__main__":
    command(main)
