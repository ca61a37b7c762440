"""How fast runs converge: AP against epochs, images, steps and time, out of TensorBoard's event files."""

import argparse
import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from framework.errors import InputError, UsageError, command
from framework.files import refuse_file_at
from framework.tracking.charts import draw_curves, draw_published, draw_sizes
from framework.tracking.console import setup_logging, write_json
from framework.tracking.curves import Curve, read_curve

EXAMPLE = """examples:
  python -m framework.convergence runs/deformable-seed1 runs/deformable-seed2 runs/detr-seed1 --out convergence \\
      --baseline detr
  python -m framework.convergence 'Deformable DETR=runs/a' 'DETR, 12 epochs=runs/b' 'DETR, 120 epochs=runs/c' \\
      --out convergence --method 'Deformable DETR' --schedules 'DETR, 12 epochs' 'DETR, 120 epochs'
  python -m framework.convergence ours=runs/a theirs=some/folder --tag val/AP --tag eval/mAP --out convergence
      (beside somebody else's run)

RUN is a run folder, or any folder with event files, with a label before it where LABEL= stands there; runs of one
label are seeds of one line. Without a label: the folder's name without -seedN."""

SHARES = (0.5, 0.75, 0.9, 1.0)  # of the baseline's best AP
# A baseline counts as converged where it ends within 90 % of the method's AP, or at half of it, if it had become flat:
# gained less than 1 AP. One that never learnt anything is flat too, and proves nothing.
NEAR_ENOUGH, HALF, FLAT = 0.9, 0.5, 0.01
SEEDS = 3  # of fewer, a ratio is preliminary
AXES = ("epoch", "images", "step", "hours")

log = logging.getLogger("tenfold")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None, is_main=True)
    lines = read_lines(args)
    out, tags = Path(args.out), " or ".join(args.tag)
    for axis in AXES:
        draw_curves(lines, axis, tags, out / f"ap-{axis}")
    draw_sizes(lines, out / "sizes")
    draw_published(PUBLISHED, SOURCES, out / "published")
    write_layout(out, args.tag)
    result = compared(lines, args)
    try:
        if args.method:
            result["protocol"] = protocol(lines[args.method], [lines[label] for label in args.schedules])
    finally:  # what can be compared, also where the protocol cannot
        write_json(out / "convergence.json", result)
        (out / "convergence.md").write_text(markdown(lines, result))
    print(markdown(lines, result))
    log.info("charts, table and JSON are in %s", out)
    return 0


def read_lines(args: argparse.Namespace) -> dict[str, list[Curve]]:
    """The curves of each label that can be compared, among them those of the labels that the flags name."""
    curves = comparable([curve for text in args.runs if (curve := read_curve(text, args.tag, args.epoch_tag))])
    if not curves:
        raise InputError("no run is left to draw; the lines above say why")
    lines = by_label(curves)
    labels = {"--baseline": [args.baseline], "--method": [args.method], "--schedules": args.schedules}
    for flag, label in ((flag, label) for flag, named in labels.items() for label in named):
        if label is not None and label not in lines:
            raise UsageError(f"{flag} {label}: expected one of {', '.join(lines)}")
    return lines


def compared(lines: dict[str, list[Curve]], args: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON takes it, without the protocol."""
    runs = [vars(curve) for curves in lines.values() for curve in curves]
    return {"tags": args.tag, "runs": runs} | (
        {"milestones": milestones(lines, args.baseline)} if args.baseline else {}
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m framework.convergence", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="[LABEL=]FOLDER with TensorBoard's event files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the charts, the table and the JSON")
    parser.add_argument("--tag", action="append", metavar="TAG", help="scalar to compare (val/AP); again: another one "
                        "of those runs that do not have the first")  # fmt: skip
    parser.add_argument("--epoch-tag", action="append", metavar="TAG", help="scalar that says the epoch (epoch)")
    parser.add_argument("--baseline", metavar="LABEL", help="whose best AP the others' epochs are measured against")
    parser.add_argument("--method", metavar="LABEL", help="with --schedules: whose final AP a schedule has to reach")
    parser.add_argument("--schedules", nargs="+", metavar="LABEL", default=[], help="the baseline's complete schedules")
    args = parser.parse_args(argv)
    args.tag, args.epoch_tag = args.tag or ["val/AP"], args.epoch_tag or ["epoch"]
    if bool(args.method) != bool(args.schedules):
        raise UsageError("--method, --schedules: expected both or neither")
    refuse_file_at("--out", args.out)
    return args


def comparable(curves: list[Curve]) -> list[Curve]:
    """Those that were trained and evaluated on what most of them were; a line for each of the others."""
    for name in dict.fromkeys(name for curve in curves for name in curve.common):
        found = Counter(value for curve in curves if (value := curve.common[name]) is not None)
        if not found:
            continue
        (chosen, count), *_ = found.most_common()
        for curve in curves:
            if curve.common[name] is None and name == "data.train":
                log.warning("%s: %s does not say what data it was trained on; taken as the same as the others'",
                            curve.label, curve.folder)  # fmt: skip
            elif curve.common[name] not in (chosen, None):
                log.warning("%s is left out: %s has %s %s, %d of the other runs %s", curve.label, curve.folder, name,
                            curve.common[name], count, chosen)  # fmt: skip
        curves = [curve for curve in curves if curve.common[name] in (chosen, None)]
    return curves


def by_label(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Raises UsageError: two runs have a label in common and are no seeds."""
    lines: dict[str, list[Curve]] = {}
    for curve in curves:
        lines.setdefault(curve.label, []).append(curve)
    for label, seeds in lines.items():
        folders = [Path(curve.folder).resolve() for curve in seeds]
        if twice := [str(folder) for folder, count in Counter(folders).items() if count > 1]:
            raise UsageError(f"{label}: expected another folder for each seed; found {', '.join(twice)} more than once")
        unnamed = [curve for curve in seeds if not curve.named and Path(curve.folder).name == label]
        if unnamed and len(seeds) > 1:
            raise UsageError(f"{', '.join(curve.folder for curve in seeds)}: all of them would be called {label}; "
                             "expected LABEL=FOLDER, or names that end in -seedN for seeds of one line")  # fmt: skip
    return lines


def milestones(lines: dict[str, list[Curve]], baseline: str) -> list[dict[str, Any]]:
    """Where each line reaches shares of the baseline's best AP, and how many times sooner than the baseline does.

    The best is what all of the baseline's seeds reach. Numbers are [lowest, median, highest] over seeds, ratios over
    all pairs of seeds; null where one of the seeds does not come that far.
    """
    best = min(curve.best for curve in lines[baseline])
    rows = []
    for share in SHARES:
        for label, curves in lines.items():
            row: dict[str, Any] = {"share": share, "AP": share * best, "label": label, "seeds": len(curves)}
            for axis in AXES:
                own = [curve.first(axis, share * best) for curve in curves]
                theirs = [curve.first(axis, share * best) for curve in lines[baseline]]
                row[axis] = spread(own)
                row[f"{axis}, times sooner"] = spread([b / a if a and b else None for a in own for b in theirs])
            rows.append(row)
    return rows


def spread(numbers: Sequence[float | None]) -> list[float] | None:
    known = [number for number in numbers if number is not None]
    return [min(known), statistics.median(known), max(known)] if known and len(known) == len(numbers) else None


def protocol(method: list[Curve], schedules: list[list[Curve]]) -> dict[str, Any]:
    """The shortest complete schedule of the baseline whose final AP reaches the method's, in the method's epochs.

    Final APs are means over seeds. Valid only if the longest schedule ends within NEAR_ENOUGH of the method's AP, or at
    HALF of it and flat: no seed moved by FLAT over the last fifth before its learning rate dropped. What is not
    valid has no ratio. Raises InputError: a run does not say its epochs, or is no complete schedule.
    """
    target, length = final(method), epochs_of(method)
    table: list[dict[str, Any]] = [
        {"label": curves[0].label, "seeds": len(curves), "epochs": epochs_of(curves),
         "times": epochs_of(curves) / length, "AP": final(curves)}
        for curves in sorted(schedules, key=epochs_of)
    ]  # fmt: skip
    longest = max(schedules, key=epochs_of)
    gains = [gain_before_drop(curve) for curve in longest]
    flat = all(gain is not None and abs(gain) < FLAT for gain in gains)
    share = final(longest) / target if target else 0.0
    valid = share >= NEAR_ENOUGH or (flat and share >= HALF)
    ratio = next((row["times"] for row in table if row["AP"] >= target), None) if valid else None
    shorter = [row["times"] for row in table if ratio and row["times"] < ratio]
    if not valid:
        words = "the baseline has not converged: no ratio"
    elif ratio is None:
        words = f"> {table[-1]['times']:.3g} times as many epochs, not reached"
    elif shorter:
        words = f"more than {shorter[-1]:.3g}, at most {ratio:.3g} times as many epochs"
    else:
        words = f"at most {ratio:.3g} times as many epochs (no shorter schedule is there)"
    seeds = min(len(curves) for curves in (method, *schedules))
    if seeds < SEEDS:
        words += f"; preliminary, with {seeds} of {SEEDS} seeds"
    return {
        "method": method[0].label,
        "seeds": len(method),
        "epochs": length,
        "AP": target,
        "schedules": table,
        "ratio": ratio,
        "in words": words,
        "valid": valid,
        "the longest's share of the method's AP": share,
        "gain of the longest over the last fifth before its drop": gains,
    }


def final(curves: Sequence[Curve]) -> float:
    return statistics.mean(float(curve.last["AP"] or 0) for curve in curves)


def epochs_of(curves: Sequence[Curve]) -> float:
    for curve in curves:
        if curve.cut:
            raise InputError(f"{curve.label}: {curve.folder} is no complete schedule: {curve.cut}")
    ends = {curve.last["epoch"] for curve in curves}
    if None in ends or len(ends) != 1:
        found = ", ".join(f"{curve.folder}: {curve.last['epoch']}" for curve in curves)
        raise InputError(f"{curves[0].label}: expected seeds that say their epochs and end at the same; found {found}")
    return float(ends.pop() or 0)


def gain_before_drop(curve: Curve) -> float | None:
    """AP over the last fifth of the epochs before the learning rate dropped; None where it did not."""
    if curve.drop_epoch is None:
        return None
    before = [p for p in curve.points if p["epoch"] is not None and p["epoch"] <= curve.drop_epoch]
    early = [p for p in before if float(p["epoch"] or 0) <= 0.8 * curve.drop_epoch]
    return float(before[-1]["AP"] or 0) - float(early[-1]["AP"] or 0) if early else None


def markdown(lines: dict[str, list[Curve]], result: dict[str, Any]) -> str:
    def shown(row: dict[str, Any], axis: str, what: str = "") -> str:
        if row[axis + what] is None:
            unknown = any(None in (curve.first(axis, 0), curve.last[axis]) for curve in lines[row["label"]])
            return "unknown" if unknown else "not reached"
        low, middle, high = (f"{number:.3g}" for number in row[axis + what])
        return middle if low == high else f"{middle} ({low} to {high})"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    text = ["# Convergence", "", "| run | folder | epochs | AP | small | medium | large | hours |",
            "|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for label, curves in lines.items():
        for curve in curves:
            last = curve.last
            sizes = " | ".join(percent(last[key]) for key in ("AP", "APs", "APm", "APl"))
            epoch, hours = (f"{v:.3g}" if v is not None else "" for v in (last["epoch"], last["hours"]))
            text.append(f"| {label} | {Path(curve.folder).name} | {epoch} | {sizes} | {hours} |")
    if found := result.get("protocol"):
        text += ["", f"Epochs of the baseline to the AP of {found['method']}, {percent(found['AP'])} after "
                 f"{found['epochs']:g}: **{found['in words']}**.", "",
                 "| complete schedule | seeds | epochs | times | final AP |", "|---|--:|--:|--:|--:|"]  # fmt: skip
        text += [f"| {row['label']} | {row['seeds']} | {row['epochs']:g} | {row['times']:.3g} | "
                 f"{percent(row['AP'])} |" for row in found["schedules"]]  # fmt: skip
    if rows := result.get("milestones"):
        text += ["", "| share of the baseline's best | AP | run | epochs | times sooner | hours | times sooner |",
                 "|--:|--:|---|--:|--:|--:|--:|"]  # fmt: skip
        sooner = ", times sooner"
        text += [f"| {row['share']:.0%} | {percent(row['AP'])} | {row['label']} | {shown(row, 'epoch')} | "
                 f"{shown(row, 'epoch', sooner)} | {shown(row, 'hours')} | {shown(row, 'hours', sooner)} |"
                 for row in rows]  # fmt: skip
    return "\n".join(text) + "\n"


def write_layout(out: Path, tags: Sequence[str]) -> None:
    """TensorBoard's custom scalars: the runs beside this folder under one tab, sizes apart."""
    layout = {"convergence": {name: ["Multiline", [f"^{tag}{size}$" for tag in tags]] for name, size in
                              (("AP", ""), ("small", "s"), ("medium", "m"), ("large", "l"))}}  # fmt: skip
    for earlier in (out / "tensorboard").glob("*tfevents*"):
        earlier.unlink()
    with SummaryWriter(str(out / "tensorboard")) as writer:
        writer.add_custom_scalars(layout)


# AP on COCO val2017, ResNet-50: (epochs, AP).
SOURCES = "Zhu et al. 2021, Table 1; 12 epochs: Zhang et al. 2022 (DINO), Table 1"
PUBLISHED: dict[str, list[tuple[int, float]]] = {
    "Faster R-CNN + FPN": [(109, 42.0)],
    "DETR": [(500, 42.0)],
    "DETR-DC5": [(12, 15.5), (50, 35.3), (500, 43.3)],
    "DETR-DC5+ (focal loss, 300 queries)": [(50, 36.2)],
    "Deformable DETR": [(12, 41.1), (50, 43.8)],
    "+ iterative refinement": [(50, 45.4)],
    "++ two-stage": [(50, 46.2)],
}


if __name__ == "__main__":
    command(main)
