"""COCO's twelve numbers of a trained detector on a shard set, or of detections in a file."""

import argparse
from typing import Any

from framework.data.loader import EvalLoader, dead_workers_told, manifest_of, refuse_no_set
from framework.engine.ds_config import autocast
from framework.engine.ranks import init_ranks
from framework.errors import UsageError, command
from framework.evaluation.coco import coco_metrics, evaluate, report, table
from framework.evaluation.detections import from_rows
from framework.evaluation.files import read_detections, read_ground_truth
from framework.files import refuse_folder_at
from framework.processes import keep_freed_memory
from framework.tracking.console import progress, publish, setup_logging
from framework.trained import Trained, add_arguments, load_trained

EXAMPLE = """examples:
  python -m framework.evaluate --run runs/quickstart
  python -m framework.evaluate --weights r50_deformable_detr.pth --config configs/coco_r50_deformable.yaml \\
      --data shards/coco-val --out evaluation.json
  python -m framework.evaluate --detections detections.json --annotations instances_val.json

The table and, as the last line, its JSON go to stdout; -1 means that there is nothing of that kind to find.
Of equal scores in one image and class the larger box counts first (cocoapi: the one that comes first)."""


@dead_workers_told()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    metrics, image_side, facts = of_files(args) if args.detections else of_model(args)
    publish(table(metrics, image_side), report(metrics, image_side, **facts), args.out)
    return 0


def of_files(args: argparse.Namespace) -> tuple[dict[str, float], int | None, dict[str, Any]]:
    setup_logging(None, is_main=True)
    truth = read_ground_truth(args.annotations)
    detections_N = from_rows(read_detections(args.detections, truth))
    facts = {"source": args.detections, "data": args.annotations, "images": len(truth["images"])}
    metrics = coco_metrics(truth, detections_N, args.image_side)
    return metrics, args.image_side, facts | {"detections": len(detections_N)}


def of_model(args: argparse.Namespace) -> tuple[dict[str, float], int | None, dict[str, Any]]:
    """Collective: under a launcher every rank takes its share of the images."""
    overrides = args.overrides + ([f"eval.image_side={args.image_side}"] if args.image_side else [])
    if args.data is not None:
        refuse_no_set("--data", args.data)
    trained = load_trained(args, overrides, args.data)
    config, data = trained.config, args.data or trained.config.data.val
    if data is None:
        raise UsageError("--data: expected a shard folder, since the configuration's data.val names none")
    refuse_no_set("data.val", data)
    refuse_other_classes(trained, [c.name for c in manifest_of(data, config.data).classes], data)
    ranks = init_ranks()
    logger = setup_logging(None, ranks.is_main)
    logger.info("weights of %s on %s, %d process(es)", trained.weights, ranks.device, ranks.world)
    loader = EvalLoader(data, config.data, batch_size=config.eval.batch, rank=ranks.rank, world=ranks.world)
    ranks.refuse_different({"--data" if args.data else "data.val": loader.manifest.fingerprint})
    if ranks.device.type == "cpu":
        keep_freed_memory()
    model = trained.model.to(ranks.device)
    with (
        progress(-(-loader.manifest.images // ranks.world), description="evaluate") as bar,
        autocast(config.engine, ranks.device),
    ):
        metrics, detections_N = evaluate(
            model, loader, ranks=ranks, config=config.eval, labels=config.data.labels,
            classification=config.model.classification, progress=bar,
        )  # fmt: skip
    facts = {"source": str(trained.weights), "data": data, "images": loader.manifest.images}
    ranks.barrier()  # nobody leaves while another still reads what it sent
    return metrics, config.eval.image_side, facts | {"detections": len(detections_N)}


def refuse_other_classes(trained: Trained, found: list[str], data: str) -> None:
    """A contiguous label is a place in a list: that list must be the one the model was trained with."""
    if trained.config.data.labels == "category_id":
        return
    expected = [c.name for c in trained.names]
    if trained.classes and found != expected:
        raise UsageError(f"{data}: its classes are {found}, the model's {expected}")
    if len(found) != trained.config.model.num_classes:
        raise UsageError(f"{data}: it has {len(found)} classes, the model {trained.config.model.num_classes}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m framework.evaluate", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--data", metavar="SHARDS", help="shard folder; default: data.val of the configuration")
    parser.add_argument("--detections", metavar="JSON", help="COCO results to score instead; needs --annotations")
    parser.add_argument("--annotations", metavar="JSON", help="COCO annotations that the detections belong to")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there too")
    parser.add_argument(
        "--image-side", metavar="PX", type=int,
        help="scale the size thresholds by (PX / 640)^2; default: the configuration's eval.image_side",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the configuration's")
    args = parser.parse_intermixed_args(argv)
    if not (args.run or args.weights or args.config or args.detections or args.annotations):
        raise UsageError("expected --run RUN, or --weights FILE with --config FILE, "
                         "or --detections JSON with --annotations JSON")  # fmt: skip
    if bool(args.detections) != bool(args.annotations):
        raise UsageError("expected --detections and --annotations together")
    if args.detections and (args.run or args.weights or args.config or args.data or args.overrides):
        raise UsageError("expected either a model (--run, --weights) or --detections with --annotations, not both")
    if args.image_side is not None and args.image_side < 1:
        raise UsageError(f"--image-side {args.image_side}: expected pixels, at least 1")
    if args.out is not None:
        refuse_folder_at("--out", args.out)
    return args


if __name__ == "__main__":
    command(main)
