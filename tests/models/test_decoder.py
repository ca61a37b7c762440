"""Boxes read off references, and which gradients pass between layers."""

import math

import pytest
import torch

from framework.models.build import build_detector
from framework.models.decoder import Decoder, offset_boxes
from framework.models.queries import QueryState
from tests.models.variants import VARIANTS


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("numbers", [0, 2, 4])
def test_boxes_are_offsets_to_what_a_reference_has(numbers):
    offsets_BQ4, references_BQn = torch.randn(2, 3, 4), torch.rand(2, 3, numbers)
    boxes_BQ4 = offset_boxes(offsets_BQ4, references_BQn)
    for image in range(2):
        for query in range(3):
            starts = [math.log(x / (1 - x)) for x in references_BQn[image, query].tolist()] + [0.0] * (4 - numbers)
            moved = zip(offsets_BQ4[image, query].tolist(), starts, strict=True)
            assert boxes_BQ4[image, query].tolist() == pytest.approx([sigmoid(a + b) for a, b in moved], abs=1e-6)


def test_references_at_the_border_stay_finite():
    """As published, a reference counts as 1e-5 or more away from 0 and from 1."""
    boxes = offset_boxes(torch.zeros(1, 1, 4), torch.tensor([[[0.0, 1.0, 1e-7, 0.5]]]))
    assert boxes.flatten().tolist() == pytest.approx([1e-5, 1 - 1e-5, 1e-5, 0.5])


class Layer(torch.nn.Module):
    """Adds the first reference number to the features, and keeps the references and the tokens."""

    def __init__(self):
        super().__init__()
        self.references, self.tokens = [], []

    def forward(self, x_BQD, position_BQD, references_BQn, tokens_BSD, pyramid):
        self.references.append(references_BQn)
        self.tokens.append(tokens_BSD)
        return x_BQD + references_BQn[..., :1]


def run_decoder(refine, numbers=2):
    layer, box_heads = Layer(), [torch.nn.Linear(4, 4) for _ in range(3)]
    heads = [torch.nn.Linear(4, 2) for _ in range(3)]
    decoder = Decoder([layer] * 3, heads, box_heads, torch.nn.Identity(), refine=refine)
    first = torch.rand(1, 5, numbers, requires_grad=True)
    state = QueryState(torch.randn(1, 5, 4), torch.randn(1, 5, 4), first)
    _, boxes_KBQ4 = decoder(state, torch.empty(0), None)
    return layer.references, boxes_KBQ4, first, box_heads


@pytest.mark.parametrize("numbers", [2, 4])
def test_refined_boxes_are_the_next_references_without_their_gradient(numbers):
    references, boxes_KBQ4, first, box_heads = run_decoder(refine=True, numbers=numbers)
    assert references[0] is first
    for before, after in ((0, 1), (1, 2)):
        assert torch.equal(references[after], boxes_KBQ4[before]) and not references[after].requires_grad
    boxes_KBQ4[2].sum().backward()
    assert [bool(head.weight.grad.any()) for head in box_heads] == [False, False, True]
    assert first.grad.any()  # through the features: the first layer's references keep theirs


def test_without_refinement_all_layers_keep_the_first_references():
    references, boxes_KBQ4, first, _ = run_decoder(refine=False)
    assert all(one is first for one in references)
    boxes_KBQ4[2].sum().backward()
    assert first.grad.any()


@pytest.mark.parametrize("cast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_tokens_are_cast_for_all_layers_at_once(cast, dtype):
    layer, head = Layer(), torch.nn.Linear(4, 4)
    decoder = Decoder([layer] * 3, [head] * 3, [head] * 3, torch.nn.Identity(), refine=False, cast_tokens=cast)
    state = QueryState(torch.randn(1, 5, 4), torch.randn(1, 5, 4), torch.rand(1, 5, 2))
    with torch.autocast("cpu", torch.bfloat16):
        decoder(state, torch.randn(1, 7, 4), None)
    assert layer.tokens[0].dtype == dtype and all(one is layer.tokens[0] for one in layer.tokens)


def test_tokens_that_a_position_is_added_to_are_not_cast():
    with torch.device("meta"):
        casts = {kind: build_detector(VARIANTS[kind]).decoder.cast_tokens for kind in ("base", "two_stage", "detr")}
    assert casts == {"base": True, "two_stage": True, "detr": False}
