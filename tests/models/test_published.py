"""The models against the numbers of the published implementations."""

import json
from dataclasses import replace

import pytest
import torch

from framework.data.batch import Targets
from framework.losses.criterion import Criterion, LossConfig
from framework.losses.matcher import Stage, match
from framework.models.build import build_detector
from framework.models.weights import load_published, to_published
from tests.models.variants import VARIANTS, published_gradients, reference_state_dict
from tests.paths import reference_file

PARAMETERS = {  # all, trainable: the paper's models, counted on the published code
    "base": (40_069_665, 39_847_265),
    "box_refine": (40_849_660, 40_627_260),
    "two_stage": (41_181_529, 40_959_129),
    "single_scale": (34_066_593, 33_844_193),
    "single_scale_dc5": (34_066_593, 33_844_193),
    "detr": (41_524_768, 41_302_368),
    "detr_dc5": (41_524_768, 41_302_368),
    "base_r101": (59_009_569, 58_787_169),
    "detr_r101": (60_464_672, 60_242_272),
}


@pytest.fixture(scope="module", params=["base", "detr"])
def published(request):
    """name, our model with the reference weights, its predictions, the expected outputs, targets and numbers."""
    name = request.param
    meta = json.loads(reference_file("meta.json").read_text())[name]
    given = torch.load(reference_file("input.pt"), weights_only=True)
    expected = torch.load(reference_file("outputs.pt"), weights_only=True)[name]
    model = build_detector(replace(VARIANTS[name], dropout=0.0))
    load_published(model, reference_state_dict(model, meta["keys"]))
    predictions = model(given["imgs"].float(), given["mask"])
    targets = Targets(
        torch.cat([t["labels"] for t in given["targets"]]),
        torch.cat([t["boxes"] for t in given["targets"]]),
        [len(t["labels"]) for t in given["targets"]],
        torch.ones(2, dtype=torch.bool),
    )
    return name, model, predictions, expected, targets, meta


@pytest.mark.data
def test_predictions(published):
    _, _, predictions, expected, _, _ = published
    assert (predictions.logits_KBQC[-1] - expected["pred_logits"]).abs().max() < 1e-4
    assert (predictions.boxes_KBQ4[-1] - expected["pred_boxes"]).abs().max() < 1e-4
    assert (predictions.logits_KBQC[:-1, :, ::10] - expected["aux_logits"].float()).abs().max() < 2e-3
    assert (predictions.boxes_KBQ4[:-1, :, ::10] - expected["aux_boxes"]).abs().max() < 1e-4


@pytest.mark.data
def test_losses_assignment_and_gradients(published):
    name, model, predictions, expected, targets, meta = published
    criterion = Criterion(LossConfig(class_weight=meta["loss_weights"]["loss_ce"]), VARIANTS[name].classification)
    losses = criterion(predictions, targets, num_boxes=6.0)
    for ours, theirs in (("class", "loss_ce"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        for layer in range(6):
            found = losses[ours if layer == 5 else f"{ours}/layer{layer}"].item()
            assert found == pytest.approx(meta["losses"][theirs if layer == 5 else f"{theirs}_{layer}"], rel=1e-4)
    total = criterion.total(losses)
    assert total.item() == pytest.approx(meta["total"], rel=1e-4)

    model.zero_grad()
    total.backward()
    gradients = published_gradients(model)
    floor = 1e-6 * max(meta["grad_norms"].values())
    checked = {key: norm for key, norm in meta["grad_norms"].items() if norm > floor}
    assert len(checked) > 200
    for key, norm in checked.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-3), key


@pytest.mark.data
def test_assignment(published):
    name, _, predictions, expected, targets, meta = published
    criterion = Criterion(LossConfig(class_weight=meta["loss_weights"]["loss_ce"]), VARIANTS[name].classification)
    stage = Stage("decoder layer", predictions.logits_KBQC[-1:], predictions.boxes_KBQ4[-1:], targets)
    [query_KN] = match([stage], classification=VARIANTS[name].classification, config=criterion.config)
    for image, (queries, boxes) in enumerate(expected["indices"]):
        mine = query_KN[0][targets.image_N == image]
        assert torch.equal(mine[boxes], queries)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = build_detector(VARIANTS[name])
    parameters = list(model.parameters())
    counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    assert counts == PARAMETERS[name]


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("r101")])
def test_published_names(name):
    with torch.device("meta"):
        model = build_detector(VARIANTS[name])
    expected = json.loads(reference_file("checkpoint_keys.json").read_text())[name]
    assert {key: list(tensor.shape) for key, tensor in to_published(model).items()} == expected
