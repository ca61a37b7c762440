"""Turn a data set (COCO, Pascal VOC, YOLO) into shards: tar files that webdataset reads, an index, a manifest.

    annotations -> checked samples -> each image: read, checked -> shards -> commit

All faults of annotations and images are told at once, and then no set is made. A folder appears under its name when
everything in it is on the disk; before, it is `<name>.partial`, where a conversion that was killed, or found faults,
goes on with its finished shards. The same input gives the same bytes, whatever the number of workers and however often
it was killed.
"""

import argparse
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.annotations import DataSet
from data_tools.classes import read_names
from data_tools.coco import read_coco
from data_tools.commit import Faults, commit, is_free, partial_folder, remove
from data_tools.pack import NOTE, jobs_of, pack_all
from data_tools.sample import INDEX, MANIFEST, SPLITS, Category, Manifest, read_manifest
from data_tools.shards import WrittenShard, write_manifest
from data_tools.voc import read_voc
from data_tools.yolo import read_yolo
from framework.errors import InputError, UsageError, command
from framework.tracking.console import progress, setup_logging, write_json

EXAMPLE = """examples:
  python -m data_tools.convert --images coco/val2017 --annotations coco/annotations/instances_val2017.json \\
      --out shards/coco-val
  python -m data_tools.convert --images data/shapes/images --annotations data/shapes/annotations --out shards/shapes
  python -m data_tools.convert --format voc --images VOC2007/JPEGImages --annotations VOC2007/Annotations \\
      --split VOC2007/ImageSets/Main/train.txt --classes voc.names --out shards/voc/train
  python -m data_tools.convert --format yolo --images fish/images/val --annotations fish/labels/val \\
      --classes fish/data.yaml --out shards/fish/val

coco: with a folder of annotations its instances_train.json and instances_val.json become OUT/train and OUT/val.
Categories of one name stay classes of their own, which is told.

voc: a folder of XML files, one an image, which is found by its <filename>, or else by the name of the XML file.
Pixels count from 1 and the last is inside, as in the VOC devkit: x1 y1 x2 y2 = xmin - 1, ymin - 1, xmax, ymax. Boxes
of tools that count from 0 come out up to a pixel too far left and up; an xmin or ymin of 0 is clipped and counted.
Difficult objects are kept as ordinary ones. An image without an XML file is left out, which is told. Classes are those
that occur, sorted by name, unless --classes lists them: give it for train and val, so that both have the same.
Category ids are 1, 2, ... in their order.

yolo: a folder of .txt files named like the images, 'class cx cy w h' in fractions of the image. An image without such
a file is one without objects. Class names come from --classes, or else from the nearest classes.txt or data.yaml, in
the folder of labels or the two above. Category ids are YOLO's + 1. Lines with more columns (polygons) are faults.

voc and yolo: image ids are 1, 2, ... by file name. Train and val are converted one after the other."""

MIB = 2**20
SHOWN_FAULTS, SHOWN_CLASSES = 20, 12
MARK = ".data_tools.convert"  # tells whose an unfinished folder is
SIZE_LIMITS_PX = {"small": 32, "medium": 96, "large": float("inf")}  # COCO's, of sqrt(area)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    started, out = time.monotonic(), Path(args.out).resolve()
    files = annotation_files(args.annotations) if args.format == "coco" else {"": args.annotations}
    refuse_unfinished(out, files)
    sets = {name: read_set(path, args) for name, path in files.items()}
    refuse_other_classes(sets)
    faults = [fault for data in sets.values() for fault in data.faults]
    total = sum(len(data.samples) for data in sets.values())
    with partial_folder(out, MARK, keep=f"*{NOTE}") as folder, progress(total, description="convert") as bar:
        jobs = {name: jobs_of(folder / name, data.samples, args.images, shard_bytes=args.shard_mib * MIB,
                              verify=args.verify == "decode", reencode=args.reencode, write=not faults)
                for name, data in sets.items()}  # fmt: skip
        reports: dict[str, dict[str, Any]] = {}
        packed = iter(pack_all([job for one in jobs.values() for job in one], args.workers, bar.update))
        for name, data in sets.items():
            results = list(islice(packed, len(jobs[name])))
            faults += [fault for one in results for fault in one.faults]
            data.repairs.update(sum((one.repairs for one in results), Counter()))
            if not faults:
                reports[name] = finish_set(folder / name, data, [one.written for one in results if one.written])
        refuse(faults, left_in(folder))
        manifests = {name: read_manifest(folder / name) for name in sets}
        if is_free(out):
            commit(folder, out, without=list(folder.rglob(f"*{NOTE}")))
            done = f"{total / (time.monotonic() - started):.0f} images/s"
        else:
            refuse_other_content(out, manifests)
            done = "already there with the same content, nothing written"
    for name, manifest in manifests.items():
        print("\n".join(summary(manifest, reports[name], Path(args.out) / name)))
    print(f"{args.out}: {done}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.convert",
        description="Turn a data set into shards for training; checks all of it, makes all of it or no set.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, type=Path, help="folder that the file names start from")
    parser.add_argument("--annotations", required=True, type=Path, help="COCO's file, or a folder of annotations")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--format", choices=["coco", "voc", "yolo"], default="coco", help="of the annotations (coco)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names of voc and yolo: one a line, or YOLO's data.yaml"
    )
    parser.add_argument(
        "--split",
        type=Path,
        metavar="FILE",
        help="voc: read the XML files listed there only (ImageSets/Main/train.txt)",
    )
    parser.add_argument("--shard-mib", type=int, default=256, help="most MiB of a shard, of JPEG images (256)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes, one shard each at a time ({cores})")
    parser.add_argument(
        "--verify", choices=["decode", "none"], default="decode", help="decode every image, or trust it (decode)"
    )
    parser.add_argument(
        "--reencode", action="store_true", help="images that are not JPEG become JPEG of quality 95, not faults"
    )
    parser.add_argument(
        "--drop-bad-boxes", action="store_true", help="leave out, and list, boxes without area inside their image"
    )
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        raise UsageError(f"--images {args.images}: not a folder; expected the one that the file names start from")
    for name in ("shard_mib", "workers"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    refuse_other_format(args)
    return args


def refuse_other_format(args: argparse.Namespace) -> None:
    """Raises UsageError when --annotations, --classes or --split do not go with --format."""
    if args.split and args.format != "voc":
        raise UsageError(f"--split {args.split}: read with --format voc only, found --format {args.format}")
    if args.split and not args.split.is_file():
        raise UsageError(f"--split {args.split}: not a file; expected a list of names like ImageSets/Main/train.txt")
    if args.format == "coco" and args.classes:
        raise UsageError(f"--classes {args.classes}: COCO's file names its classes itself; leave --classes out")
    if args.format != "coco" and not args.annotations.is_dir():
        raise UsageError(f"--annotations {args.annotations}: not a folder, which --format {args.format} reads")
    if args.classes and not args.classes.is_file():
        raise UsageError(f"--classes {args.classes}: not a file; expected one with the names of the classes")


def annotation_files(path: Path) -> dict[str, Path]:
    """Set name -> annotation file of COCO; the name is a folder under the shards, empty for a single set."""
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise UsageError(f"--annotations {path}: neither a file nor a folder")
    files = {split: path / f"instances_{split}.json" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            raise UsageError(
                f"--annotations {path}: no {file.name} in it; expected {' and '.join(f.name for f in files.values())}, "
                "or name one annotation file, or the --format of the folder: voc (XML), yolo (text)"
            )
    return files


def read_set(path: Path, args: argparse.Namespace) -> DataSet:
    if args.format == "coco":
        return read_coco(path, args.drop_bad_boxes)
    names = read_names(args.classes) if args.classes else None
    if args.format == "voc":
        return read_voc(path, args.images, names, args.drop_bad_boxes, args.split)
    return read_yolo(path, args.images, names, args.drop_bad_boxes)


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


def left_in(folder: Path) -> str:
    """What becomes of an attempt with faults."""
    finished = sum(1 for _ in folder.rglob(f"*{NOTE}"))
    if not finished:
        return "nothing was written"
    return f"no set was made; {finished} finished shard(s) are kept in {folder} for the next try, or to be removed"


def refuse(faults: list[str], left: str = "nothing was written") -> None:
    """Raises Faults, a list of them, if there are any; it tells what is left of the attempt."""
    if len(faults) == 1:
        raise Faults(f"{faults[0]} ({left})")
    if faults:
        shown = faults[:SHOWN_FAULTS]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise Faults("\n  ".join([f"{len(faults)} faults, {left}:", *shown, *more]))


def finish_set(folder: Path, data: DataSet, written: list[WrittenShard]) -> dict[str, Any]:
    """Make a set of its shards; what else lies there, but notes of shards and the mark, is removed: remains of
    earlier attempts. Returns the report."""
    manifest = write_manifest(folder, written, data.classes, data.repairs)
    told = report(data)
    write_json(folder / "report.json", told)
    expected = {MARK, MANIFEST, INDEX, "report.json", *(shard.name for shard in manifest.shards)}
    remove(*(path for path in folder.iterdir() if path.name not in expected and not path.name.endswith(NOTE)))
    return told


def report(data: DataSet) -> dict[str, Any]:
    """What was converted and what was done to it; kept beside the manifest."""
    labels: Counter[int] = Counter()
    areas = array("d")
    without_boxes = crowds = 0
    for sample in data.samples:  # once: each is read from a file
        labels.update(sample.labels)
        areas.extend(sample.areas)
        without_boxes += not sample.labels
        crowds += sum(sample.iscrowd)
    sizes = np.sqrt(areas)
    bins = np.searchsorted(list(SIZE_LIMITS_PX.values()), sizes, side="right")
    return {
        "annotations": data.path.absolute().name,
        "images": len(data.samples),
        "images_without_boxes": without_boxes,
        "boxes": len(sizes),
        "crowds": crowds,
        "boxes_by_class": {name: labels[label] for label, name in enumerate(unlike_names(data.classes))},
        "boxes_by_size": {name: int((bins == n).sum()) for n, name in enumerate(SIZE_LIMITS_PX)},
        "repairs": dict(sorted(data.repairs.items())),
        "dropped": data.dropped,
        "warnings": data.warnings,
    }


def unlike_names(classes: list[Category]) -> list[str]:
    """Of each class; with its id where others have the same."""
    counts = Counter(one.name for one in classes)
    return [one.name if counts[one.name] == 1 else f"{one.name} (id {one.category_id})" for one in classes]


def summary(manifest: Manifest, report: dict[str, Any], folder: Path) -> list[str]:
    """The report for a reader, what was dropped, and warnings."""
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
        *(f"  warning: {line}" for line in report["warnings"]),
    ]


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts)


if __name__ == "__main__":
    command(main)
