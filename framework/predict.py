"""Objects in images: boxes as COCO JSON, and a picture of each image with class names and scores."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from framework.data.batch import collate
from framework.data.transforms import decode, evaluation_example
from framework.engine.ds_config import autocast
from framework.errors import FAILED, InputError, UsageError, command
from framework.evaluation.attention import look_inside
from framework.evaluation.detections import category_ids, to_coco, to_rows, top_detections
from framework.files import refuse_file_at
from framework.models.build import ModelConfig
from framework.processes import keep_freed_memory
from framework.tracking.attention import draw_attention
from framework.tracking.console import progress, setup_logging, write_json
from framework.tracking.pictures import draw_coco
from framework.trained import Trained, add_arguments, load_trained

DETECTIONS = "detections.json"
PICTURE = re.compile(r"\d{5}_.+\.png")  # ids begin at 0
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
EXAMPLE = """examples:
  python -m framework.predict --run runs/quickstart photo.jpg --out predictions
  python -m framework.predict --weights r50_deformable_detr.pth --config configs/coco_r50_deformable.yaml \\
      photos/ --out predictions-photos --score 0.5
  python -m framework.predict --run runs/quickstart photo.jpg --out predictions-12 --attention --query 12 --layer 1

DIR/detections.json is in COCO's result format plus file_name and query; image_id is the place among the images
given, from 0. Beside it stands DIR/<image_id>_<name>.png for each image, and with --attention
DIR/<image_id>_<name>_query<Q>.png: a row for the encoder, where the token in the middle of the object's box looks,
and one for the decoder, where its query looks; all levels together, then each level with its share of the weight."""

logger = logging.getLogger("tenfold")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    paths = find_images(args.images)
    out = Path(args.out)
    trained = load_trained(args, [])
    refuse_absent(args, trained.config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    trained.model.to(device)
    out.mkdir(parents=True, exist_ok=True)
    detections: list[dict[str, Any]] = []
    faults = 0
    with progress(len(paths), description="predict") as bar:
        for image_id, path in enumerate(paths):
            try:
                image = read_image(path)
            except InputError as error:
                logger.error("error: %s", error)
                faults += 1
            else:
                found = detect(trained, image, image_id, device, args.score, args.top)
                picture = out / f"{image_id:05d}_{path.stem}"
                draw_coco(image, found, trained.names).save(f"{picture}.png")
                if args.attention:
                    draw_looks(trained, image, args, picture)
                detections += [one | {"file_name": str(path)} for one in found]
            bar.update()
    write_json(out / DETECTIONS, detections, indent=None)
    logger.info("%d boxes in %d of %d images: %s", len(detections), len(paths) - faults, len(paths), out)
    return FAILED if faults else 0


def refuse_used(out: Path) -> None:
    """Raises UsageError where an earlier call's results are: its pictures, whose ids begin at 0 too, would pass for
    this one's."""
    found = sorted(path.name for path in out.glob("*") if path.name == DETECTIONS or PICTURE.fullmatch(path.name))
    if found:
        raise UsageError(f"--out: {out} holds results of an earlier call ({', '.join(found[:3])}"
                         f"{', ...' * (len(found) > 3)}); remove {DETECTIONS} and the pictures NNNNN_*.png beside "
                         "it, or choose another folder")  # fmt: skip


def find_images(names: list[str]) -> list[Path]:
    """The files named, and those with an image's suffix in the folders named, sorted within each folder."""
    found: list[Path] = []
    for path in map(Path, names):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise UsageError(f"{path}: no image in this folder; expected {', '.join(sorted(SUFFIXES))}")
        found += inside
    return found


def read_image(path: Path) -> Image.Image:
    """The image as RGB, EXIF rotation ignored as in training. Raises InputError."""
    try:
        return decode(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {error}") from error


@torch.no_grad()
def detect(
    trained: Trained, image: Image.Image, image_id: int, device: torch.device, min_score: float, limit: int
) -> list[dict[str, Any]]:
    """COCO results of one image with at least `min_score`, most certain first; resized as in evaluation."""
    data = trained.config.data
    batch = collate([evaluation_example(image, image_id, data.sizes, data.max_size, data.backend)])
    with autocast(trained.config.engine, device):
        predictions = trained.model(*batch.inputs(device))
    (found,) = top_detections(predictions, batch.original_sizes_hw, trained.config.model.classification, limit)
    found_T = to_coco(found, image_id, category_ids(trained.names, data.labels))
    return to_rows(found_T[found_T["score"] >= min_score])


def draw_looks(trained: Trained, image: Image.Image, args: argparse.Namespace, picture: Path) -> None:
    """One <picture>_query<Q>.png for each query asked for, by default for the most certain object."""
    found = look_inside(
        trained.model, image, trained.config, trained.names,
        queries=args.query, min_score=args.score, layer=args.layer,
    )  # fmt: skip
    for one in found:
        draw_attention(image, one, trained.names).save(f"{picture}_query{one.query}.png")
    if args.query is None and not found:
        logger.info("%s: no box with a score of %g or more, so no attention is drawn (--query Q draws any query's)",
                    picture.name, args.score)  # fmt: skip
    for query in sorted(set(args.query or []) - {one.query for one in found}):
        logger.warning("%s: query %d has no finite box, so its attention is not drawn", picture.name, query)


def refuse_absent(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raises UsageError for a query or a layer that the model does not have."""
    for query in args.query or []:
        if not 0 <= query < config.num_queries:
            raise UsageError(f"--query {query}: expected 0 to {config.num_queries - 1}, the model's queries")
    layers = max(config.encoder_layers, config.decoder_layers)
    if args.layer is not None and not 1 <= args.layer <= layers:
        raise UsageError(f"--layer {args.layer}: expected 1 to {layers} (layers of the encoder: "
                         f"{config.encoder_layers}, of the decoder: {config.decoder_layers})")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m framework.predict", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add_arguments(parser)
    parser.add_argument(
        "--out", metavar="DIR", required=True,
        help="folder for detections.json and the pictures; one that holds those of an earlier call is refused",
    )  # fmt: skip
    parser.add_argument("--score", type=float, default=0.3, help="least score of a box (default: %(default)s)")
    parser.add_argument("--top", type=int, default=100, metavar="N", help="most boxes of an image (%(default)s)")
    looks = parser.add_argument_group("what the detector looks at")
    looks.add_argument(
        "--attention", action="store_true", help="draw it, for the most certain object of each image: sampling points "
        "(DETR: attention maps) in encoder and decoder, with their weights",
    )  # fmt: skip
    looks.add_argument(
        "--query", type=int, action="append", metavar="Q", help="for this query instead, whatever its score; may be "
        "repeated (detections.json names the query of each box)",
    )  # fmt: skip
    looks.add_argument(
        "--layer",
        type=int,
        metavar="K",
        help="in this layer, from 1, of those parts that have it (default: the last of each)",
    )
    args = parser.parse_intermixed_args(argv)
    for flag in ("query", "layer"):
        if getattr(args, flag) is not None and not args.attention:
            raise UsageError(f"--{flag}: chooses what --attention draws; expected --attention too")
    if not 0 <= args.score <= 1:
        raise UsageError(f"--score {args.score}: expected 0 to 1")
    if args.top < 1:
        raise UsageError(f"--top {args.top}: expected at least 1")
    refuse_file_at("--out", args.out)
    refuse_used(Path(args.out))
    return args


if __name__ == "__main__":
    command(main)
