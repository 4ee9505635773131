"""The contrastive losses against hand-computed cases, across processes, and a toy pool that is learned in seconds."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor

from flux import lora_layers
from flux.config import TINY
from lora import contrast
from lora.adapter import Adapter, LowRank
from lora.contrast import Retriever, gathered, reference_loss, soft_loss
from lora.encoder import Encoder, Sizes
from lora.probes import augmented, changes


def test_reference_loss_of_a_3_by_3_case():
    """Cosines 1, 0.6, 0 / 0.8, 0.96, 0.6 / 0, 0.8, 1 between captions (rows) and LoRAs, put in by hand at temperature 1."""
    text = torch.tensor([[2.0, 0.0], [0.8, 0.6], [0.0, 5.0]])
    lora = torch.tensor([[3.0, 0.0], [0.6, 0.8], [0.0, 0.1]])
    S = [[1, 0.6, 0], [0.8, 0.96, 0.6], [0, 0.8, 1]]
    by_row = [math.log(sum(math.exp(S[i][j]) for j in range(3))) - S[i][i] for i in range(3)]
    by_column = [math.log(sum(math.exp(S[j][i]) for j in range(3))) - S[i][i] for i in range(3)]
    expected = 10 * sum(a + b for a, b in zip(by_row, by_column, strict=True)) / 3
    assert reference_loss(lora, text).item() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(16.2029, abs=1e-4)


def test_soft_loss_with_one_caption_each_is_clips():
    lora, text = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = reference_loss(lora, text).item() / 20  # both sides, mean instead of ten times the sum
    assert soft_loss(lora, text, torch.arange(5), 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_soft_loss_of_two_captions_for_one_lora():
    """Captions 0 and 1 tell of LoRA 0, caption 2 of LoRA 1; LoRA 2 has none and is a wrong answer only."""
    S = torch.tensor([[0.9, 0.1, 0.3], [0.5, 0.2, -0.4], [-0.1, 0.8, 0.0]])
    text, lora = torch.eye(3), S.T
    norms = lora.norm(dim=1)
    scaled = 4.0 * S / norms
    rows, columns = scaled.log_softmax(1), scaled.log_softmax(0)
    by_text = -(rows[0, 0] + rows[1, 0] + rows[2, 1]) / 3
    by_lora = -((columns[0, 0] + columns[1, 0]) / 2 + columns[2, 1]) / 2
    found = soft_loss(lora, text, torch.tensor([0, 0, 1]), 4.0)
    assert found.item() == pytest.approx(((by_text + by_lora) / 2).item(), rel=1e-6)


def test_figures_of_a_ranking():
    similarity = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.2, 0.2, 0.3, 0.1]])
    right = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert contrast.ranks(similarity, right).tolist() == [1, 3]  # the tie counts as lost
    assert contrast.recall(similarity, right, 1) == 0.5 and contrast.recall(similarity, right, 4) == 1.0
    first = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert contrast.ndcg(similarity[:1], right[:1]) == pytest.approx(first)


# --- two processes ---

def parts() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, generator=g), torch.randn(8, 6, generator=g), torch.arange(4).repeat_interleave(2)


def work(rank: int, root: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    lora, text, owner = parts()
    W = torch.eye(6, requires_grad=True)
    mine, said = slice(2 * rank, 2 * rank + 2), slice(4 * rank, 4 * rank + 4)
    loss = soft_loss(gathered(lora[mine] @ W), gathered(text[said] @ W), gathered(owner[said]), 3.0)
    loss.backward()
    torch.save((loss.detach(), W.grad), root / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_gather_have_the_gradient_of_one(tmp_path, fork_server):
    processes.start_processes(work, (tmp_path,), nprocs=2, start_method="forkserver")
    (a, one), (b, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    lora, text, owner = parts()
    W = torch.eye(6, requires_grad=True)
    loss = soft_loss(lora @ W, text @ W, owner, 3.0)
    loss.backward()
    assert a.item() == b.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(one + other, W.grad, rtol=1e-5, atol=1e-7)


# --- a toy pool ---

def toy_pool(layers, count: int = 64, themes: int = 8) -> tuple[list[Adapter], Tensor, Tensor]:
    """LoRAs that share their theme's change, beside one of their own of equal size; of many ranks, scales and bases, and
    without a tenth of the layers. Captions (count, 3, 16) are their theme's vector and noise."""
    g = torch.Generator().manual_seed(0)

    def pair(layer, rank: int):
        return torch.randn(rank, layer.inputs, generator=g) / layer.inputs ** 0.5, torch.randn(layer.rows, rank, generator=g)

    def turned(A: Tensor, B: Tensor) -> LowRank:
        R = torch.eye(len(A)) + 0.3 * torch.randn(len(A), len(A), generator=g)
        return LowRank(R @ A, torch.linalg.solve(R.T, B.T).T)

    shared = [{layer.name: pair(layer, 2) for layer in layers} for _ in range(themes)]
    loras, theme = [], torch.arange(count) % themes
    for t in theme.tolist():
        strength, terms = math.exp(torch.randn((), generator=g)), {}
        for layer in layers:
            A, B = pair(layer, 1 + int(torch.randint(3, (), generator=g)))
            A, B = torch.cat((shared[t][layer.name][0], A)), torch.cat((shared[t][layer.name][1], B), dim=1)
            if torch.rand((), generator=g) > 0.1:
                terms[layer.name] = (turned(A, 0.01 * strength * B),)
        loras.append(Adapter(terms))
    words = torch.randn(themes, 16, generator=g)
    return loras, theme, words[theme][:, None] + 0.3 * torch.randn(count, 3, 16, generator=g)


def test_themes_of_held_out_loras_are_found_after_300_steps():
    layers = lora_layers.layers(TINY)[::3]
    loras, theme, captions = toy_pool(layers)
    pool = [changes(lora, layers) for lora in loras]
    torch.manual_seed(0)
    sizes = Sizes(width=32, depth=1, heads=2, head_dim=16, hidden=64, probes=4, narrow=16, out=16)
    model = Retriever(Encoder(layers, sizes), captions.shape[-1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        some = torch.randperm(48, generator=g)[:16]
        owner = torch.arange(16).repeat_interleave(2)
        told = captions[some[owner], torch.randint(3, owner.shape, generator=g)]
        loss = model.loss([augmented(pool[i], g, truncation=0) for i in some.tolist()], told, owner)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        vectors, text = model.encoder.eval()(pool[48:]), model.head(captions[48:].flatten(0, 1))
    similarity = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    right = theme[48:].repeat_interleave(3)[:, None] == theme[48:]
    assert contrast.recall(similarity, right, 5) > 0.9
    assert contrast.recall(torch.rand_like(similarity), right, 5) < 0.5  # by chance, 5 of 16
