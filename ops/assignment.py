"""The assignment of least total cost (Carion et al. 2020, section 3.1), of all decoder layers and images at once.

On a GPU by a kernel of csrc/, for which the processor does not wait; elsewhere, and with TENFOLD_OP=reference, by
scipy.
"""

# B image, K decoder layer, N target of all images, Q query

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ops import chosen, compiled, library


def assign(cost_KNQ: Tensor, image_N: Tensor, counts_B: list[int]) -> Tensor:
    """Each target to a query of its own, at least total cost, in each layer and image.

    Args:
        cost_KNQ: float32, of the queries of the target's own image.
        image_N: int64, the image of each target, ascending. counts_B: how many each image has, at most Q.
    Returns:
        query_KN: int64, on the device of the costs; -1 for all targets of an image some of whose costs are not finite.
    """
    if chosen.implementation is compiled and cost_KNQ.is_cuda:
        library.check(cost_KNQ.device)
        return torch.ops.tenfold.assign(cost_KNQ, image_N, len(counts_B))
    costs, starts = cost_KNQ.cpu().numpy(), np.cumsum([0, *counts_B])
    query_KN = np.full(costs.shape[:2], -1, dtype=np.int64)
    for cost_NQ, query_N in zip(costs, query_KN, strict=True):
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            if np.isfinite(cost_NQ[start:stop]).all():
                rows, columns = linear_sum_assignment(cost_NQ[start:stop])
                query_N[start:stop][rows] = columns
    return torch.from_numpy(query_KN).to(cost_KNQ.device)
