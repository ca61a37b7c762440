import pytest
import torch

from framework.data.batch import Targets
from framework.losses.matcher import LossConfig, Stage, TooManyBoxes, match, pair_costs
from tests.oracles import matching


def problem(counts=(2, 0, 3), K=2, Q=5, C=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, N = len(counts), sum(counts)
    targets = Targets(torch.randint(C - 1, (N,), generator=g), torch.rand(N, 4, generator=g) * 0.4 + 0.2, list(counts),
                      torch.ones(B, dtype=torch.bool))  # fmt: skip
    return torch.randn(K, B, Q, C, generator=g), torch.rand(K, B, Q, 4, generator=g) * 0.4 + 0.2, targets


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_costs_and_assignment_against_loops(classification):
    logits, boxes, targets = problem()
    stage = Stage(logits, boxes, targets)
    costs = pair_costs(stage, classification, LossConfig())
    query_KN = match(stage, classification=classification, config=LossConfig())
    start = 0
    for image, count in enumerate(targets.counts_B):
        for layer in range(2):
            mine = [
                [
                    matching.pair_cost(logits[layer, image, q].tolist(), boxes[layer, image, q].tolist(),
                                       targets.labels_N[n], targets.boxes_cxcywh_N4[n].tolist(),
                                       classification == "focal")
                    for q in range(5)
                ]
                for n in range(start, start + count)
            ]  # fmt: skip
            assert costs[layer, start : start + count].tolist() == [pytest.approx(row, abs=1e-5) for row in mine]
            if count:
                assert tuple(query_KN[layer, start : start + count].tolist()) == matching.best_assignment(mine)
        start += count


def test_no_boxes_at_all():
    logits, boxes, targets = problem(counts=(0, 0))
    stage = Stage(logits, boxes, targets)
    assert match(stage, classification="focal", config=LossConfig()).shape == (2, 0)


def test_more_boxes_than_queries_is_an_error():
    with pytest.raises(
        TooManyBoxes, match="image 1 of the batch has 6 boxes and the model 5 queries: raise model.num_q"
    ):
        match(Stage(*problem(counts=(1, 6))), classification="focal", config=LossConfig())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_of_an_image_with_costs_that_are_not_finite_nothing_is_assigned(bad):
    logits, boxes, targets = problem()
    expected = match(Stage(logits, boxes, targets), classification="focal", config=LossConfig())
    boxes[1, 2, 3, 0] = bad
    expected[1, 2:] = -1
    assert match(Stage(logits, boxes, targets), classification="focal", config=LossConfig()).equal(expected)
