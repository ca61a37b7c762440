"""Where queries come from: the boxes that tokens propose, the choice of the best, what carries a gradient."""

import pytest
import torch
from torch import nn

from framework.models.queries import EncoderProposals, LearnedPoints
from tests.models.pyramids import SIZES_HW, UNPADDED_HW, make_pyramid
from tests.oracles import positions

WIDTH = 8


def proposals(num_queries=6, sizes_hw=SIZES_HW, unpadded_hw=UNPADDED_HW):
    """A module, tokens and their pyramid."""
    torch.manual_seed(0)
    module = EncoderProposals(num_queries, WIDTH, nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 4))
    pyramid = make_pyramid(sizes_hw, unpadded_hw, WIDTH)
    return module, torch.randn(*pyramid.padding_BS.shape, WIDTH), pyramid


def oracle(sizes_hw, unpadded_hw):
    """grid_BS4 and usable_BS of the loops."""
    images = [positions.proposals(sizes_hw, image) for image in unpadded_hw]
    return (torch.tensor([[token[part] for token in image] for image in images]) for part in (0, 1))


@pytest.mark.parametrize("sizes_hw, unpadded_hw", [
    (SIZES_HW, UNPADDED_HW),
    ([(8, 8)] * 6, [[(8, 8)] * 6]),  # the sides of the last level are beyond the border
    ([(2, 60)], [[(2, 60)], [(1, 40)]]),  # so are the outermost centres of 60, not those of 40
    # Centres on the border: published, 0.5 / 50 > 0.01 is false; 50 / 85 * 85 is not 50 in float32.
    ([(2, 85), (99, 2)], [[(2, 50), (50, 2)]]),
])  # fmt: skip
def test_proposals_against_loops(sizes_hw, unpadded_hw):
    """A token proposes a box about its own centre, with its offsets; those left out a box in the far corner."""
    module, tokens_BSD, pyramid = proposals(2, sizes_hw, unpadded_hw)
    grid_BS4, usable_BS = oracle(sizes_hw, unpadded_hw)
    features_BSD = module.token_norm(module.token_projection(tokens_BSD * usable_BS[..., None]))
    state = module(tokens_BSD, pyramid)
    torch.testing.assert_close(state.proposal_logits_BSC, module.class_head(features_BSD))
    boxes_BS4 = (module.box_head(features_BSD) + (grid_BS4 / (1 - grid_BS4)).log()).sigmoid()
    expected_BS4 = torch.where(usable_BS[..., None], boxes_BS4, 1.0)
    torch.testing.assert_close(state.proposal_boxes_BS4, expected_BS4, rtol=0, atol=1e-5)


def test_what_lies_under_the_padding_does_not_matter():
    module, tokens_BSD, pyramid = proposals()
    expected = module(tokens_BSD, pyramid)
    found = module(tokens_BSD.masked_fill(pyramid.padding_BS[..., None], float("nan")), pyramid)
    for name, tensor in vars(expected).items():
        assert torch.equal(tensor, getattr(found, name)), name


def test_queries_are_the_tokens_with_the_best_logits_of_class_0():
    module, tokens_BSD, pyramid = proposals()
    state = module(tokens_BSD, pyramid)
    for image in range(2):
        ranks = [
            sorted(range(53), key=lambda s, c=c: -state.proposal_logits_BSC[image, s, c].item())[:6] for c in range(3)
        ]
        assert set(ranks[0]) not in (set(ranks[1]), set(ranks[2]))
        assert torch.equal(state.references_BQn[image], state.proposal_boxes_BS4[image, ranks[0]])


def test_position_and_content_are_read_off_the_boxes():
    module, tokens_BSD, pyramid = proposals()
    state = module(tokens_BSD, pyramid)
    code = [[positions.box_code(box, WIDTH // 2) for box in image] for image in state.references_BQn.tolist()]
    embedded = module.code_norm(module.code_projection(torch.tensor(code)))
    torch.testing.assert_close(state.position_BQD, embedded[..., :WIDTH], rtol=0, atol=1e-5)
    torch.testing.assert_close(state.content_BQD, embedded[..., WIDTH:], rtol=0, atol=1e-5)


def with_gradient(module):
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_queries_carry_no_gradient_to_the_tokens():
    module, tokens_BSD, pyramid = proposals()
    tokens_BSD.requires_grad_()
    state = module(tokens_BSD, pyramid)
    assert not state.references_BQn.requires_grad
    (state.content_BQD + 0.5 * state.position_BQD).square().sum().backward()
    assert tokens_BSD.grad is None
    assert with_gradient(module) == {"code_projection", "code_norm"}


def test_proposals_carry_a_gradient_to_the_tokens_that_may_propose():
    module, tokens_BSD, pyramid = proposals()
    tokens_BSD.requires_grad_()
    state = module(tokens_BSD, pyramid)
    (state.proposal_logits_BSC.square().sum() + state.proposal_boxes_BS4.square().sum()).backward()
    assert torch.equal(tokens_BSD.grad.any(-1), ~pyramid.padding_BS)
    assert with_gradient(module) == {"token_projection", "token_norm", "class_head", "box_head"}


def test_fewer_tokens_than_queries():
    module, tokens_BSD, pyramid = proposals(num_queries=60)
    assert module(tokens_BSD, pyramid).references_BQn.shape == (2, 53, 4)


def test_learned_points():
    """The first half of an embedding is the position, off which the reference point is read; it keeps its gradient."""
    module = LearnedPoints(5, WIDTH)
    state = module(torch.empty(2, 9, WIDTH), None)
    position, content = module.embedding.weight[:, :WIDTH], module.embedding.weight[:, WIDTH:]
    for image in range(2):
        assert torch.equal(state.position_BQD[image], position) and torch.equal(state.content_BQD[image], content)
        torch.testing.assert_close(state.references_BQn[image], module.reference_points(position).sigmoid())
    state.references_BQn.square().sum().backward()
    assert with_gradient(module) == {"embedding", "reference_points"}
    assert module.embedding.weight.grad[:, :WIDTH].any() and not module.embedding.weight.grad[:, WIDTH:].any()
