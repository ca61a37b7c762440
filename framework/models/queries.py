"""Where the decoder's queries come from: learnt vectors, or the encoder's best proposals.

Each module maps (tokens, pyramid) to QueryState.

# B image, S token, Q query, D model width, C class
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.models.attention import Pyramid
from framework.models.linear import Float32Linear
from framework.models.position import sine_box_code
from ops.linear import Linear


@dataclass
class QueryState:
    """What the decoder starts from.

    content_BQD, position_BQD: features and position code of the queries.
    references_BQn: where they look, fractions of the unpadded image: n = 2 points, 4 boxes (cxcywh), 0 none.
    proposal_logits_BSC, proposal_boxes_BS4: what every token predicts on its own, where proposals are made.
    """

    content_BQD: Tensor
    position_BQD: Tensor
    references_BQn: Tensor
    proposal_logits_BSC: Tensor | None = None
    proposal_boxes_BS4: Tensor | None = None


class LearnedEmbeddings(nn.Module):
    """Learnt position codes, no content and no references. Source: Carion et al. 2020, section 3.2."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.position = nn.Embedding(num_queries, width)

    def forward(self, tokens_BSD: Tensor, pyramid: Pyramid) -> QueryState:
        position_BQD = every_row(self.position).expand(len(tokens_BSD), -1, -1)
        return QueryState(torch.zeros_like(position_BQD), position_BQD, position_BQD[..., :0].float())


class LearnedPoints(nn.Module):
    """Learnt content and position codes; a reference point read off the position. Source: Zhu et al. 2021, A.3."""

    def __init__(self, num_queries: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(num_queries, 2 * width)
        self.reference_points = Float32Linear(width, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, tokens_BSD: Tensor, pyramid: Pyramid) -> QueryState:
        position_QD, content_QD = every_row(self.embedding).chunk(2, dim=-1)
        points_Q2 = self.reference_points(position_QD).sigmoid()
        batch = len(tokens_BSD)
        return QueryState(*(x.expand(batch, -1, -1) for x in (content_QD, position_QD, points_Q2)))


def every_row(embedding: nn.Embedding) -> Tensor:
    """Its weight, by a lookup: under ZeRO 3 a weight is there only while its module computes."""
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


class EncoderProposals(nn.Module):
    """Every token proposes a box; the best `num_queries` become queries ("two-stage").

    class_head, box_head: heads over all tokens; the logit of class 0 is the score, since the targets of this
    stage are all class 0. Boxes and position codes of queries carry no gradient back. Source: Zhu et al. 2021, A.4.
    """

    BASE_SIDE = 0.05  # side of the proposals of the finest level, doubled from level to level
    BORDER = 0.01  # tokens whose proposal is closer to 0 or 1 than this are left out

    def __init__(self, num_queries: int, width: int, class_head: nn.Module, box_head: nn.Module):
        super().__init__()
        self.num_queries, self.width = num_queries, width
        self.class_head, self.box_head = class_head, box_head
        self.token_projection = Linear(width, width)
        self.token_norm = nn.LayerNorm(width)
        self.code_projection = Linear(2 * width, 2 * width)
        self.code_norm = nn.LayerNorm(2 * width)

    def forward(self, tokens_BSD: Tensor, pyramid: Pyramid) -> QueryState:
        grid_BS4, usable_BS1 = self._grid(pyramid)
        tokens_BSD = self.token_norm(self.token_projection(tokens_BSD.masked_fill(~usable_BS1, 0.0)))
        logits_BSC = self.class_head(tokens_BSD)
        offsets_BS4 = self.box_head(tokens_BSD)
        unusable = float("inf")  # the sigmoid of which is a box in the far corner, as published
        boxes_BS4 = (offsets_BS4 + grid_BS4.logit().masked_fill(~usable_BS1, unusable)).sigmoid()

        best_BQ = logits_BSC[..., 0].topk(min(self.num_queries, len(logits_BSC[0])), dim=1).indices
        references_BQ4 = boxes_BS4.gather(1, best_BQ[..., None].expand(-1, -1, 4)).detach()
        code = self.code_norm(self.code_projection(sine_box_code(references_BQ4, self.width // 2)))
        position_BQD, content_BQD = code.chunk(2, dim=-1)
        return QueryState(content_BQD, position_BQD, references_BQ4, logits_BSC, boxes_BS4)

    def _grid(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The box each token starts from (B, S, 4), and whether it may propose (B, S, 1)."""
        centres_BS2 = pyramid.centres_BS2()
        sides = [self.BASE_SIDE * 2.0**level for level in range(len(pyramid.shapes_hw))]
        counts = [height * width for height, width in pyramid.shapes_hw]
        side_S = torch.cat([centres_BS2.new_full((n,), side) for n, side in zip(counts, sides, strict=True)])
        grid_BS4 = torch.cat([centres_BS2, side_S[:, None].expand_as(centres_BS2)], dim=-1)
        border = self.BORDER + 1e-6  # a centre on the border is out, however the unpadded size was rounded
        inside = ((grid_BS4 > border) & (grid_BS4 < 1 - border)).all(-1, keepdim=True)
        return grid_BS4, inside if pyramid.padding_BS is None else inside & ~pyramid.padding_BS[..., None]
