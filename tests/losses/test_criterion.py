import math

import pytest
import torch

from framework.data.batch import Targets
from framework.losses.criterion import Criterion, LossConfig
from framework.losses.matcher import Stage, match
from framework.models.detector import Predictions
from tests.losses.test_matcher import problem


def test_focal_against_loops():
    logits, boxes, targets = problem(counts=(1, 2))
    losses = Criterion(LossConfig(), "focal")(Predictions(logits, boxes), targets, num_boxes=1.5)
    query_KN = match(Stage(logits, boxes, targets), classification="focal", config=LossConfig())
    for layer, name in ((0, "class/layer0"), (1, "class")):
        expected = 0.0
        for image in range(2):
            for query in range(5):
                for label in range(4):
                    p = 1 / (1 + math.exp(-logits[layer, image, query, label]))
                    hit = any(
                        targets.image_N[n] == image and query_KN[layer, n] == query and targets.labels_N[n] == label
                        for n in range(3)
                    )
                    expected += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
        assert losses[name].item() == pytest.approx(expected / 1.5, rel=1e-5)


def test_layers_have_names_and_weights():
    logits, boxes, targets = problem()
    criterion = Criterion(LossConfig(class_weight=3.0, box_weight=7.0, giou_weight=11.0), "focal")
    losses = criterion(Predictions(logits, boxes, Predictions(logits[:1], boxes[:1])), targets, num_boxes=5.0)
    assert set(losses) == {t + n for t in ("class", "box", "giou") for n in ("/layer0", "", "/proposals")}
    expected = sum({"class": 3, "box": 7, "giou": 11}[n.split("/")[0]] * loss.item() for n, loss in losses.items())
    assert criterion.total(losses).item() == pytest.approx(expected, rel=1e-5)


def test_without_auxiliary_losses_the_last_layer_has_all_of_them():
    predictions, targets = two_stage_problem()
    everything = Criterion(LossConfig(), "focal")(predictions, targets, 5.0)
    last = Criterion(LossConfig(auxiliary=False), "focal")(predictions, targets, 5.0)
    assert set(last) == {name for name in everything if "/layer" not in name}
    assert all(torch.equal(last[name], everything[name]) for name in last)


def test_proposals_know_one_class():
    """They are matched and scored as if every target were class 0, the decoder's layers are not."""
    predictions, targets = two_stage_problem()
    predictions.proposals.logits_KBQC *= 4  # so that the class decides the matching
    criterion = Criterion(LossConfig(), "focal")
    found = criterion(predictions, targets, 5.0)
    decoder = criterion(Predictions(predictions.logits_KBQC, predictions.boxes_KBQ4), targets, 5.0)
    assert targets.labels_N.any() and {name: found[name] for name in decoder} == decoder
    labelled = criterion(predictions.proposals, targets, 5.0)
    targets.labels_N = torch.zeros_like(targets.labels_N)
    nothing_but_objects = criterion(predictions.proposals, targets, 5.0)
    for term in ("class", "box", "giou"):
        assert found[f"{term}/proposals"] == nothing_but_objects[term] != labelled[term]


def test_targets_of_one_class_are_made_where_they_are():
    targets = problem()[2].to("meta")
    objects = targets.of_one_class()
    assert objects.labels_N.is_meta and objects.labels_N is not targets.labels_N
    assert objects.boxes_cxcywh_N4 is targets.boxes_cxcywh_N4 and objects.counts_B == targets.counts_B


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_empty_images_give_a_loss_and_a_gradient(classification):
    logits, boxes, targets = problem(counts=(0, 0))
    logits.requires_grad_()
    criterion = Criterion(LossConfig(), classification)
    losses = criterion(Predictions(logits, boxes), targets, num_boxes=1.0)
    assert losses["box"] == losses["giou"] == 0
    criterion.total(losses).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_masked_slots_do_not_count(classification):
    """A batch with a masked slot has the loss of the batch without it."""
    logits, boxes, targets = problem(counts=(2, 0, 3))
    targets.valid_B[1] = False
    rest = Targets(targets.labels_N, targets.boxes_cxcywh_N4, [2, 3], torch.ones(2, dtype=torch.bool))
    criterion = Criterion(LossConfig(), classification)
    a = criterion(Predictions(logits, boxes), targets, 5.0)
    b = criterion(Predictions(logits[:, [0, 2]], boxes[:, [0, 2]]), rest, 5.0)
    assert {n: x.item() for n, x in a.items()} == pytest.approx({n: x.item() for n, x in b.items()}, rel=1e-5)


def test_perfect_predictions_have_no_box_loss():
    _, _, targets = problem(counts=(2, 1), Q=4)
    logits = torch.full((1, 2, 4, 4), -20.0)
    boxes = torch.rand(1, 2, 4, 4) * 0.1 + 0.05
    for n, (image, query) in enumerate([(0, 3), (0, 1), (1, 2)]):
        boxes[0, image, query] = targets.boxes_cxcywh_N4[n]
        logits[0, image, query, targets.labels_N[n]] = 20.0
    losses = Criterion(LossConfig(), "focal")(Predictions(logits, boxes), targets, 3.0)
    assert all(loss.item() == pytest.approx(0.0, abs=1e-5) for loss in losses.values())


def two_stage_problem():
    logits, boxes, targets = problem()
    return Predictions(logits, boxes, Predictions(logits[:1].clone(), boxes[:1].clone())), targets


def test_losses_whose_matching_is_not_finite_are_no_numbers_and_so_are_their_gradients():
    predictions, targets = two_stage_problem()
    boxes_KBQ4 = predictions.proposals.boxes_KBQ4
    boxes_KBQ4[0, 2, 1] = float("inf")
    losses = Criterion(LossConfig(), "focal")(predictions, targets, num_boxes=5.0)
    assert {name for name, loss in losses.items() if loss.isnan()} == {
        "class/proposals",
        "box/proposals",
        "giou/proposals",
    }
    logits_KBQC = predictions.proposals.logits_KBQC.requires_grad_()
    losses = Criterion(LossConfig(), "focal")(predictions, targets, num_boxes=5.0)
    losses["class/proposals"].backward()
    assert logits_KBQC.grad.isnan().any()
