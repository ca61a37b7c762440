"""Costs and assignment in loops, and the best assignment by trying all of them."""

import itertools
import math


def giou(a, b):
    """Of two cxcywh boxes."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return overlap / union - (hull - union) / hull


def pair_cost(logits, box, label, wanted, focal):
    if focal:
        p = 1 / (1 + math.exp(-logits[label]))
        class_cost = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    else:
        class_cost = -math.exp(logits[label]) / sum(math.exp(x) for x in logits)
    return 2 * class_cost + 5 * sum(abs(x - y) for x, y in zip(box, wanted, strict=True)) - 2 * giou(box, wanted)


def best_assignment(costs):
    """costs[n][q] -> for each n its query, at least total cost."""
    queries = range(len(costs[0]))
    return min(
        itertools.permutations(queries, len(costs)), key=lambda qs: sum(costs[n][q] for n, q in enumerate(qs))
    )  # fmt: skip
