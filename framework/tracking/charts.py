"""Charts of convergence, for print and for the colour-blind: lines differ in colour, dash and label at their end."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter  # noqa: E402

from framework.tracking.curves import Curve  # noqa: E402

# Okabe and Ito 2008, without the yellow that paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX"
NAMES = {"epoch": "epochs", "images": "images seen", "step": "optimizer steps", "hours": "hours"}

Lines = Mapping[str, Sequence[Curve]]


def draw_curves(lines: Lines, axis: str, tag: str, path: Path) -> None:
    """AP against one axis, linear and logarithmic, as PNG and SVG; nothing where no run knows that axis."""
    lines = known(lines, axis, "AP")
    if not lines:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel in panels:
        _draw(panel, lines, axis, "AP")
        panel.set_xlabel(NAMES[axis])
    _logarithmic(panels[1])
    panels[0].set_ylim(bottom=0)  # of both, once all lines are there
    panels[0].set_ylabel(f"AP, percent ({tag})")
    panels[0].legend(loc="lower right", fontsize=8, frameon=False)
    _save(figure, path)


def draw_sizes(lines: Lines, path: Path) -> None:
    """AP of small, medium and large objects against epochs; nothing where no run has them."""
    if lines := known(lines, "epoch", "APs"):
        _save(figure_of_sizes(lines), path)


def figure_of_sizes(lines: Lines) -> Figure:
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    for panel, (name, key) in zip(panels, (("small", "APs"), ("medium", "APm"), ("large", "APl")), strict=True):
        _draw(panel, lines, "epoch", key)
        panel.set(title=f"{name} objects", xlabel=NAMES["epoch"])
        _logarithmic(panel)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("AP, percent")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def known(lines: Lines, axis: str, key: str) -> Lines:
    """Those whose runs all have both."""
    return {
        label: curves
        for label, curves in lines.items()
        if all(any(None not in (p[axis], p[key]) for p in curve.points) for curve in curves)
    }


def draw_published(published: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Others' figures, in a chart of their own."""
    figure, panel = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for i, (label, points) in enumerate(published.items()):
        epochs, aps = zip(*points, strict=True)
        panel.plot(epochs, aps, color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], label=label)
    panel.set(xscale="log", xlabel="epochs, logarithmic", ylabel="AP on COCO val2017, percent",
              title="Published figures (ResNet-50), not measured here", xlim=(8, 800))  # fmt: skip
    panel.set_xticks([12, 50, 109, 500], labels=["12", "50", "109", "500"], minor=False)
    panel.minorticks_off()
    panel.legend(loc="lower right", fontsize=8, frameon=False)
    panel.grid(alpha=0.3)
    _save(figure, path)


def _draw(panel: Axes, lines: Lines, axis: str, key: str) -> None:
    """The mean over seeds at the places that all have, and a band from the lowest to the highest."""
    for i, (label, curves) in enumerate(lines.items()):
        seeds = [{p[axis]: p[key] for p in curve.points if None not in (p[axis], p[key])} for curve in curves]
        if axis == "hours":  # no two runs are at the same place at the same time
            places = [statistics.mean(column) for column in zip(*seeds, strict=False)]
            columns = list(zip(*(seed.values() for seed in seeds), strict=False))
        else:
            places = sorted(set.intersection(*map(set, seeds)))
            columns = [tuple(seed[place] for seed in seeds) for place in places]
        if not places:
            continue
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dash(i)}
        means = [100 * statistics.mean(column) for column in columns]
        name = label if len(curves) == 1 else f"{label}, {len(curves)} seeds"
        panel.plot(places, means, **style, linewidth=1.6, label=name)
        panel.plot(places[-1:], means[-1:], color=style["color"], marker=MARKERS[i % len(MARKERS)])
        if len(curves) > 1:
            low, high = ([100 * extreme(column) for column in columns] for extreme in (min, max))
            panel.fill_between(places, low, high, color=style["color"], alpha=0.18, linewidth=0)
    panel.grid(alpha=0.3)


def dash(line: int) -> Any:
    """Another one for every line of a colour."""
    return DASHES[(line + line // len(COLOURS)) % len(DASHES)]


def _logarithmic(panel: Axes) -> None:
    panel.set(xscale="log", xlabel=f"{panel.get_xlabel()}, logarithmic")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=130)
    pyplot.close(figure)
