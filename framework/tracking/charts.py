"""Charts of convergence, for print and for the colour-blind: lines differ in colour, dash and the mark at their end."""

import logging
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter  # noqa: E402

from framework.tracking.curves import Curve  # noqa: E402

# Okabe and Ito 2008, without the yellow that paper swallows; then Tol's wine, and grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#882255", "#808080")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (2, 2)))
MARKERS = "osD^vPXh<"
NAMES = {"epoch": "epochs", "images": "images seen", "step": "optimizer steps", "hours": "hours"}
SIZES = {"small": "APs", "medium": "APm", "large": "APl"}
ENDINGS = (".png", ".svg")

Lines = Mapping[str, Sequence[Curve]]

log = logging.getLogger("tenfold")


def draw_curves(lines: Lines, axis: str, name: str, path: Path) -> None:
    """AP, as `name`, against one axis, linear and logarithmic, as PNG and SVG; nothing where no run knows that axis."""
    lines = known(lines, axis, ("AP",), path)
    if not lines:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel in panels:
        draw_lines(panel, lines, axis, "AP")
        panel.set_xlabel(NAMES[axis])
    _logarithmic(panels[1])
    panels[0].set_ylim(bottom=0)  # of both, once all lines are there
    panels[0].set_ylabel(f"AP, percent ({name})")
    _legend(figure, panels)
    _save(figure, path)


def draw_sizes(lines: Lines, path: Path) -> None:
    """AP of small, medium and large objects against epochs; nothing where no run has them."""
    if lines := known(lines, "epoch", SIZES.values(), path):
        _save(figure_of_sizes(lines), path)


def figure_of_sizes(lines: Lines) -> Figure:
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (name, key) in zip(panels, SIZES.items(), strict=True):
        draw_lines(panel, lines, "epoch", key)
        panel.set(title=f"{name} objects", xlabel=NAMES["epoch"])
        _logarithmic(panel)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("AP, percent")
    _legend(figure, panels)
    return figure


def known(lines: Lines, axis: str, keys: Collection[str], path: Path) -> Lines:
    """Those whose runs share a step at which all know the axis and one of the scores; a line for each of the others.

    Where there are none, what an earlier call has drawn there is removed: a chart shows these runs, or is not there.
    """
    found = {label: curves for label, curves in lines.items() if any(places(curves, axis, key) for key in keys)}
    for label in lines.keys() - found.keys():
        log.warning("%s is not in the chart %s: its runs share no step at which they know %s and %s", label, path.name,
                    NAMES[axis], " or ".join(keys))  # fmt: skip
    if not found:
        for ending in ENDINGS:
            path.with_suffix(ending).unlink(missing_ok=True)
    return found


def places(curves: Sequence[Curve], axis: str, key: str) -> list[tuple[float, list[float]]]:
    """Of each place that all seeds have: where it is and their scores. In hours no two are at the same place: there it
    is the mean of the hours at a step."""
    by = "step" if axis == "hours" else axis
    seeds = [{p[by]: p for p in curve.points if None not in (p[axis], p[key])} for curve in curves]
    shared = sorted(place for place in set.intersection(*map(set, seeds)) if place is not None)
    columns = [[seed[place] for seed in seeds] for place in shared]
    return [
        (statistics.mean(float(p[axis] or 0) for p in column), [float(p[key] or 0) for p in column])
        for column in columns
    ]


def draw_published(published: Mapping[str, Sequence[tuple[int, float]]], sources: str, path: Path) -> None:
    """Others' figures, in a chart of their own: of complete schedules, so that no line leads from one to the next."""
    figure, panel = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    for i, (label, points) in enumerate(published.items()):
        epochs, aps = zip(*points, strict=True)
        panel.plot(epochs, aps, color=COLOURS[i], linestyle="", marker=MARKERS[i], markersize=8, label=label)
    panel.set(xscale="log", xlabel="epochs of a complete schedule, logarithmic",
              ylabel="AP on COCO val2017, percent", xlim=(8, 800))  # fmt: skip
    panel.set_title(f"Published figures (ResNet-50), not measured here\n{sources}", fontsize=10)
    panel.set_xticks([12, 50, 109, 500], labels=["12", "50", "109", "500"], minor=False)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    _save(figure, path)


def draw_lines(panel: Axes, lines: Lines, axis: str, key: str) -> None:
    """The mean over seeds at the places that all have, and a band from the lowest to the highest."""
    for i, (label, curves) in enumerate(lines.items()):
        found = places(curves, axis, key)
        if not found:  # no object of that size
            continue
        where, columns = zip(*found, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        panel.plot(where, [100 * statistics.mean(column) for column in columns], color=colour, linestyle=dash(i),
                   linewidth=1.6, marker=MARKERS[i % len(MARKERS)], markevery=[-1],
                   label=label if len(curves) == 1 else f"{label}, {len(curves)} seeds")  # fmt: skip
        if len(curves) > 1:
            low, high = ([100 * extreme(column) for column in columns] for extreme in (min, max))
            panel.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.grid(alpha=0.3)


def dash(line: int) -> Any:
    """Another one for every line of a colour."""
    return DASHES[(line + line // len(COLOURS)) % len(DASHES)]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them, where no line runs under it."""
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)), fontsize=8,
                  frameon=False)  # fmt: skip


def _logarithmic(panel: Axes) -> None:
    panel.set(xscale="log", xlabel=f"{panel.get_xlabel()}, logarithmic")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 8)))
    panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in ENDINGS:
        figure.savefig(path.with_suffix(ending), dpi=130)
    pyplot.close(figure)
