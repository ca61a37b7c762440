"""Assignments against scipy's: of the kernel where there is a GPU; emulated, tests/ops/emulate_cuda.cpp has it too."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ops.assignment import assign

COUNTS_B = {"one": [1], "few": [3, 0, 20], "as many as queries": [40, 39, 40], "empty": [0, 0]}


def problem(counts_B: list[int], queries: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randn(3, sum(counts_B), queries, generator=generator).cumsum(1)
    image_N = torch.repeat_interleave(torch.arange(len(counts_B)), torch.tensor(counts_B))
    return costs.to(device), image_N.to(device)


@pytest.mark.parametrize("queries", [40, 300, 1500])
@pytest.mark.parametrize("counts_B", COUNTS_B.values(), ids=COUNTS_B)
def test_it_is_scipys(counts_B, queries, device):
    costs, image_N = problem(counts_B, queries, device)
    query_KN = assign(costs, image_N, counts_B)
    assert query_KN.dtype == torch.int64 and query_KN.device == costs.device
    for cost_NQ, query_N in zip(costs.cpu(), query_KN.cpu(), strict=True):
        parts = zip(cost_NQ.split(counts_B), query_N.split(counts_B), strict=True)
        for cost_nQ, query_n in parts:
            assert query_n.tolist() == linear_sum_assignment(cost_nQ)[1].tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_an_image_with_costs_that_are_not_finite_gets_none(bad, device):
    counts_B = [3, 0, 20]
    costs, image_N = problem(counts_B, 40, device)
    expected = assign(costs, image_N, counts_B)
    costs[1, 22, 39] = bad
    expected[1, 3:] = -1
    assert assign(costs, image_N, counts_B).equal(expected)


def test_equal_costs_still_give_every_target_a_query_of_its_own(device):
    costs, image_N = problem([7, 30], 30, device)
    query_KN = assign(torch.zeros_like(costs), image_N, [7, 30]).cpu()
    for query_N in query_KN:
        assert all(len(part.unique()) == len(part) and part.min() >= 0 for part in query_N.split([7, 30]))
