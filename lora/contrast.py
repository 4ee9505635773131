"""Learning which caption belongs to which LoRA: both sides become vectors, and pairs must be nearer than all others.

The symmetric contrastive loss of CLIP (arXiv 2103.00020), as AutoLoRA writes it (arXiv 2508.02107) and as we do: several
captions of one LoRA are all right, the temperature is learned, and the others of all processes count. Captions come as
features of a frozen text encoder; LoRAs as changes (`probes.py`).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora.encoder import Reference
from lora.probes import Changes

FIRST_SCALE, LARGEST_SCALE = math.log(1 / 0.07), math.log(100)  # of logits: as CLIP begins, and where it ends


def reference_loss(lora: Tensor, text: Tensor) -> Tensor:
    """Rows (b, d), caption i of LoRA i -> 10 * mean(-log softmax over columns - log softmax over rows), temperature 1."""
    S = F.normalize(text, dim=1) @ F.normalize(lora, dim=1).T
    target = torch.arange(len(S), device=S.device)
    return 10 * (F.cross_entropy(S, target) + F.cross_entropy(S.T, target))


def soft_loss(lora: Tensor, text: Tensor, owner: Tensor, scale: Tensor | float) -> Tensor:
    """LoRAs (n, d), captions (t, d), the LoRA (t,) that each caption tells of, -1 for none -> a scalar.

    For caption j: -log softmax over LoRAs of scale * S_ji, its mean over the right i; the same for LoRA i over captions;
    and the mean of both means.
    """
    S = scale * F.normalize(text, dim=1) @ F.normalize(lora, dim=1).T                 # (t, n)
    right = (owner[:, None] == torch.arange(len(lora), device=owner.device)).to(S)
    told = right.sum(dim=0) > 0  # LoRAs without a caption here are wrong answers only
    by_text = -(right * S.log_softmax(dim=1)).sum(dim=1)[right.any(dim=1)]
    by_lora = -(right * S.log_softmax(dim=0)).sum(dim=0)[told] / right.sum(dim=0)[told]
    return (by_text.mean() + by_lora.mean()) / 2


def gathered(x: Tensor) -> Tensor:
    """Rows of all processes, as many from each, in order; gradients flow into our own.

    Every process then has the same loss, and the sum of their gradients is that of one process with all rows.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


class Retriever(nn.Module):
    """An encoder of LoRAs and a linear head on text features (t, text_width), trained to agree."""

    def __init__(self, encoder: nn.Module, text_width: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(text_width, encoder.sizes.out)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE))

    @torch.no_grad()
    def standardise(self, text: Tensor) -> None:
        """Fold the mean and deviation of features (n, text_width) into the head, so that learning begins with neither."""
        size = text.std(dim=0) + 1e-3 * text.std()
        self.head.weight /= size
        self.head.bias -= self.head.weight @ text.mean(dim=0)

    def loss(self, loras: Sequence[Changes], text: Tensor, owner: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """owner (t,): the row of `loras` that each caption tells of. As many LoRAs and captions in every process."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        vectors, texts = gathered(self.encoder(loras, noise)), gathered(self.head(text))
        return soft_loss(vectors, texts, gathered(torch.where(owner < 0, owner, owner + rank * len(loras))), self.scale)

    @property
    def scale(self) -> Tensor:
        """Of the logits."""
        return self.log_scale.clamp(max=LARGEST_SCALE).exp()


class ReferenceRetriever(nn.Module):
    """As published: the text encoder's own features, one caption for each LoRA, nothing gathered."""

    def __init__(self, encoder: Reference):
        super().__init__()
        self.encoder = encoder

    def loss(self, loras: Sequence[Changes], text: Tensor, owner: Tensor, noise: torch.Generator | None = None) -> Tensor:
        assert noise is None and torch.equal(owner.cpu(), torch.arange(len(loras)))
        return reference_loss(self.encoder(loras), text)


def ranks(similarity: Tensor, right: Tensor) -> Tensor:
    """similarity (t, n) and which are right -> (t,) the best rank of a right one, from 1; ties count as worse."""
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarity >= best) & ~right).sum(dim=1)


def recall(similarity: Tensor, right: Tensor, k: int) -> float:
    """Share of all right ones that stand among the best k of their row, out of as many as can."""
    best = torch.zeros_like(right).scatter(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    return ((best & right).sum(dim=1) / right.sum(dim=1).clamp(max=k)).mean().item()


def ndcg(similarity: Tensor, right: Tensor, k: int = 10) -> float:
    """Discounted cumulative gain of the best k over that of the best order."""
    k = min(k, similarity.shape[1])
    order = similarity.topk(k, dim=1).indices
    discount = 1 / torch.log2(torch.arange(k, device=similarity.device) + 2.0)
    ideal = torch.stack([discount[:int(count)].sum() for count in right.sum(dim=1).clamp(max=k)])
    return ((right.gather(1, order) * discount).sum(dim=1) / ideal).mean().item()
