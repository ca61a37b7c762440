"""Turn a data set in COCO format into shards: tar files that webdataset reads, an index, a manifest.

    annotations -> checked samples -> each image: read, checked, re-encoded unless JPEG -> shards -> commit

All faults of annotations and images are told at once, and then nothing is written. A folder appears under its
name when everything in it is on the disk; before, it is `<name>.partial`.
"""

import argparse
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from data_tools.coco import DataSet, read_coco
from data_tools.commit import commit, is_free, partial_folder
from data_tools.pixels import to_8_bit
from data_tools.sample import MANIFEST, SPLITS, Manifest, Sample, read_manifest
from data_tools.shards import ShardSetWriter
from framework.errors import InputError, UsageError, command
from framework.tracking.console import progress, setup_logging, write_json

EXAMPLE = """examples:
  python -m data_tools.convert --images coco/val2017 --annotations coco/annotations/instances_val2017.json \\
      --out shards/coco-val
  python -m data_tools.convert --images data/shapes/images --annotations data/shapes/annotations --out shards/shapes

With a folder of annotations its instances_train.json and instances_val.json become OUT/train and OUT/val."""

MIB = 2**20
SHOWN_FAULTS, SHOWN_CLASSES = 20, 12
SIZE_LIMITS_PX = {"small": 32, "medium": 96, "large": float("inf")}  # COCO's, of sqrt(area)
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: cameras that append a second picture to a JPEG file


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    started, out = time.monotonic(), Path(args.out).resolve()
    files = annotation_files(Path(args.annotations))
    refuse_unfinished(out, files)
    sets = {name: read_coco(path, args.drop_bad_boxes) for name, path in files.items()}
    refuse_other_classes(sets)
    faults = [fault for data in sets.values() for fault in data.faults]
    total = sum(len(data.samples) for data in sets.values())
    with partial_folder(out) as folder, progress(total, description="convert") as bar:
        for name, data in sets.items():
            write_set(folder / name, data, args, faults, bar.update)
        refuse(faults)
        manifests = {name: read_manifest(folder / name) for name in sets}
        if is_free(out):
            commit(folder, out)
            done = f"{total / (time.monotonic() - started):.0f} images/s"
        else:
            refuse_other_content(out, manifests)
            done = "already there with the same content, nothing written"
    for name, manifest in manifests.items():
        print("\n".join(summary(manifest, report(sets[name]), Path(args.out) / name)))
    print(f"{args.out}: {done}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.convert",
        description="Turn a data set into shards for training; checks all of it, writes all of it or nothing.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, type=Path, help="folder that the file names start from")
    parser.add_argument("--annotations", required=True, type=Path, help="annotation file, or a folder of them")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--format", choices=["coco"], default="coco", help="of the annotations (coco)")
    parser.add_argument("--shard-mib", type=int, default=256, help="most MiB of a shard (256)")
    parser.add_argument(
        "--verify", choices=["decode", "none"], default="decode", help="decode every image, or trust it (decode)"
    )
    parser.add_argument(
        "--drop-bad-boxes", action="store_true", help="leave out, and list, boxes without area inside their image"
    )
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        raise UsageError(f"--images {args.images}: not a folder; expected the one that the file names start from")
    if args.shard_mib < 1:
        raise UsageError(f"--shard-mib {args.shard_mib}: expected 1 or more")
    return args


def annotation_files(path: Path) -> dict[str, Path]:
    """Set name -> annotation file; the name is a folder under the shards, empty for a single set."""
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise UsageError(f"--annotations {path}: neither a file nor a folder")
    files = {split: path / f"instances_{split}.json" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            raise UsageError(
                f"--annotations {path}: no {file.name} in it; expected {' and '.join(f.name for f in files.values())}, "
                "or name one annotation file"
            )
    return files


def refuse_unfinished(out: Path, names: Iterable[str]) -> None:
    """Raises UsageError when `out` holds something else than these sets; what they hold is compared later."""
    missing = [name for name in names if not (out / name / MANIFEST).is_file()]
    if missing and not is_free(out):
        raise UsageError(
            f"{out}: exists, and {out / missing[0]} is not a finished shard set; remove it or choose another --out"
        )


def refuse_other_content(out: Path, manifests: dict[str, Manifest]) -> None:
    for name, manifest in manifests.items():
        found = read_manifest(out / name).fingerprint
        if found != manifest.fingerprint:
            raise UsageError(
                f"{out / name}: exists with other content (fingerprint {found}, this conversion gives "
                f"{manifest.fingerprint}); remove it or choose another --out"
            )


def refuse_other_classes(sets: dict[str, DataSet]) -> None:
    first, *others = sets.values()
    for other in others:
        different = sorted({str(one) for one in set(first.classes) ^ set(other.classes)})
        if different:
            raise InputError(
                f"{other.path}: its categories differ from those of {first.path} in {', '.join(different[:4])}; "
                "expected the same list, since labels are places in it"
            )


def refuse(faults: list[str]) -> None:
    """Raises InputError that lists the faults, if there are any."""
    if len(faults) == 1:
        raise InputError(f"{faults[0]} (nothing was written)")
    if faults:
        shown = faults[:SHOWN_FAULTS]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise InputError("\n  ".join([f"{len(faults)} faults, nothing was written:", *shown, *more]))


def write_set(
    folder: Path, data: DataSet, args: argparse.Namespace, faults: list[str], done: Callable[[], Any]
) -> None:
    """Check every image; write the set unless there are faults, from before or now, which are added to `faults`."""
    writer = ShardSetWriter(folder, args.shard_mib * MIB)
    for sample in data.samples:
        try:
            jpeg = read_image(args.images / sample.file_name, sample, args.verify == "decode", data.repairs)
            if not faults:
                writer.add(sample, jpeg)
        except InputError as error:
            faults.append(str(error))
        done()
    if not faults:
        writer.finish(data.classes, data.repairs)
        write_json(folder / "report.json", report(data))


def read_image(path: Path, sample: Sample, verify: bool, repairs: Counter[str]) -> bytes:
    """The file's own bytes when they are JPEG, else re-encoded; what is not plain RGB is counted as a repair.

    Raises:
        InputError: missing, empty, not an image, truncated, or not of the size that the annotations say.
    """
    advice = f"mend it, or take image {sample.image_id} out of the annotations"
    if not path.is_file():
        raise InputError(f"{path}: missing; {advice}")
    data = path.read_bytes()
    if not data:
        raise InputError(f"{path}: an empty file, 0 bytes; {advice}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kept = image.format in JPEG_FORMATS
            check_size(image, sample)
            count_repairs(image, kept, repairs)
            if verify:
                image.load()
            return data if kept else to_jpeg(image)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that Pillow reads; {advice}") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over
        raise InputError(f"{path}: {error}; {advice}") from error


def check_size(image: Image.Image, sample: Sample) -> None:
    if image.size != (sample.width, sample.height):
        found, expected = "{}x{}".format(*image.size), f"{sample.width}x{sample.height}"
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 1
        hint = " (EXIF would turn it, which COCO's boxes do not follow)" if turned else ""
        raise InputError(f"is {found}{hint}, the annotations say {expected}")


def count_repairs(image: ImageFile.ImageFile, kept: bool, repairs: Counter[str]) -> None:
    if kept and image.mode != "RGB":
        repairs[f"{'greyscale' if image.mode == 'L' else image.mode} JPEG to be read as RGB"] += 1
    if not kept:
        repairs[f"{image.format} re-encoded as JPEG"] += 1
    if ";16" in str(image.tile):  # Pillow's name of the stored bits; the mode alone hides 16-bit colour
        repairs["16-bit image scaled to 8 bit"] += 1


def to_jpeg(image: Image.Image) -> bytes:
    """8 bit, grey or RGB, quality 95. Raises InputError: floating-point pixels, whose range nobody knows."""
    if image.mode == "F":
        raise InputError("has floating-point pixels, expected 8 or 16 bit")
    image = to_8_bit(image)
    buffer = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L", "LA") else "RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def report(data: DataSet) -> dict[str, Any]:
    """What was converted and what was done to it; kept beside the manifest."""
    labels = Counter(label for sample in data.samples for label in sample.labels)
    sizes = np.sqrt([area for sample in data.samples for area in sample.areas])
    bins = np.searchsorted(list(SIZE_LIMITS_PX.values()), sizes, side="right")
    return {
        "annotations": data.path.name,
        "images": len(data.samples),
        "images_without_boxes": sum(not sample.labels for sample in data.samples),
        "boxes": len(sizes),
        "crowds": sum(sum(sample.iscrowd) for sample in data.samples),
        "boxes_by_class": {one.name: labels[label] for label, one in enumerate(data.classes)},
        "boxes_by_size": {name: int((bins == n).sum()) for n, name in enumerate(SIZE_LIMITS_PX)},
        "repairs": dict(sorted(data.repairs.items())),
        "dropped": data.dropped,
    }


def summary(manifest: Manifest, report: dict[str, Any], folder: Path) -> list[str]:
    """The report for a reader, and what was dropped."""
    mib = sum(shard.bytes for shard in manifest.shards) / MIB
    most = Counter(report["boxes_by_class"]).most_common(SHOWN_CLASSES)
    more = len(manifest.classes) - len(most)
    sizes = (f"{name} {count / report['boxes']:.0%}" for name, count in report["boxes_by_size"].items())
    return [
        f"{folder}: {len(manifest.shards)} shard(s), {mib:.1f} MiB, fingerprint {manifest.fingerprint}",
        "  {images} images ({images_without_boxes} without boxes), {boxes} boxes ({crowds} crowds)".format(**report),
        f"  {len(manifest.classes)} classes: {_listed(most)}" + (f" and {more} more" if more else ""),
        f"  sizes: {', '.join(sizes)} (COCO's: area under 32^2, under 96^2 px, larger)",
        f"  repairs: {_listed(report['repairs'].items()) or 'none'}",
        *(f"  dropped: {line}" for line in report["dropped"]),
    ]


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts)


if __name__ == "__main__":
    command(main)
