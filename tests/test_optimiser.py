"""Which parameters Muon moves, how far, and that a run with it resumes to the bit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flux import optimiser as optimisers
from flux import resume
from flux.config import DEMO, TINY
from flux.errors import UserError
from flux.model import Flux
from flux.settings import Training
from flux.t5 import T5Encoder

MUON = Training(optimiser="muon", lr=0.01)


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 4)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x).tanh())


def steps(net, optimiser, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        (net(x) - x[:, :4]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_muon_takes_the_matrices_of_the_blocks():
    model = nn.ModuleDict({"flux": Flux(TINY), "t5": T5Encoder(DEMO.t5)})
    hidden = {name for name, p in model.named_parameters() if optimisers.is_hidden(name, p)}
    assert {"flux.double_blocks.0.img_attn.qkv.weight", "flux.single_blocks.1.linear2.weight",
            "t5.encoder.block.1.layer.1.DenseReluDense.wo.weight"} <= hidden
    for outside in ("img_in", "final_layer", "mod", "bias", "shared", "norm", "time_in"):
        assert not any(outside in name for name in hidden), outside
    built = optimisers.build(model, MUON)
    held = [p for group in built.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))


def test_a_step_of_muon_is_orthogonal_and_as_long_as_one_of_adamw():
    net = Net()
    before = net.blocks[0].weight.detach().clone()
    steps(net, optimisers.build(net, MUON), 1)
    moved = before - net.blocks[0].weight.detach()
    singular = torch.linalg.svdvals(moved) / (0.01 * 0.2 * 10**0.5)  # 0.2 sqrt(longer edge): arXiv 2502.16982, equation 4
    assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz in five steps comes that near to one


def test_without_blocks_all_is_adamw_and_without_biases_all_is_muon():
    assert isinstance(optimisers.build(nn.Linear(3, 3), MUON), torch.optim.AdamW)
    bare = nn.ModuleDict({"blocks": nn.Linear(3, 3, bias=False)})
    assert [type(part) for part in optimisers.build(bare, MUON).parts] == [torch.optim.Muon]


def state(net, optimiser):
    return dict(net.named_parameters()), optimiser, {name: p.detach().clone() for name, p in net.named_parameters()}


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    whole, stopped, resumed = Net(), Net(), Net(1)
    of_whole, of_stopped, of_resumed = (optimisers.build(net, MUON) for net in (whole, stopped, resumed))
    steps(whole, of_whole, 3)
    steps(stopped, of_stopped, 3)
    resume.save(tmp_path, 3, *state(stopped, of_stopped))
    assert resume.load(tmp_path, "auto", *state(resumed, of_resumed)) == 3
    steps(whole, of_whole, 4)
    steps(resumed, of_resumed, 4)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("saved", "asked"), [("muon", "adamw"), ("adamw", "muon")])
def test_the_moments_of_the_other_optimiser_are_refused(saved, asked, tmp_path):
    net = Net()
    optimiser = optimisers.build(net, Training(optimiser=saved))
    steps(net, optimiser, 1)
    resume.save(tmp_path, 1, *state(net, optimiser))
    other = Net(1)
    with pytest.raises(UserError, match="expected .*--optimiser"):
        resume.load(tmp_path, "auto", *state(other, optimisers.build(other, Training(optimiser=asked))))


class Counting(torch.optim.Optimizer):
    """SGD whose step shrinks with a count that it keeps for each parameter, and with a sum that it keeps for the group."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "seen": 0.1, "first": True,
                                  "most": float("inf")})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", torch.zeros(3, dtype=torch.float64)) + p.grad.double().sum()
                group["seen"] += 0.1 * p.grad.double().square().sum().item()
                p -= group["lr"] / (state["count"] + group["seen"]) * (p.grad + 1e-3 * state["sum"].sum().float())
            group["first"] = False


def test_any_optimiser_resumes_to_the_bit_with_all_its_numbers(tmp_path):
    settings = Training(optimiser=f"{__name__}.Counting", lr=0.1)
    nets = whole, stopped, resumed = Net(), Net(), Net(1)
    built = [optimisers.build(net, settings) for net in nets]
    for net, optimiser in zip(nets[:2], built[:2], strict=True):
        steps(net, optimiser, 3)
    resume.save(tmp_path, 3, *state(stopped, built[1]))
    assert resume.load(tmp_path, "auto", *state(resumed, built[2])) == 3
    inner, theirs = built[0].inner, built[2].inner
    assert not any("most" in key for p in whole.parameters() for key in built[0].state[p])  # which guards would stop for
    assert theirs.param_groups[0]["seen"] == inner.param_groups[0]["seen"] and theirs.param_groups[0]["first"] is False
    assert [type(each["count"]) for each in theirs.state.values()] == [int] * 4
    for net, optimiser in ((whole, built[0]), (resumed, built[2])):
        steps(net, optimiser, 4)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["nowhere.Adam", "torch.optim.Nothing", "torch.optim.Optimizer"])
def test_an_optimiser_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--optimiser {name}: .*; expected adamw, muon"):
        optimisers.build(Net(), Training(optimiser=name))
    with pytest.raises(UserError, match="--optimiser adan: expected"):
        Training(optimiser="adan")


def test_b_learns_faster_than_a_under_lora_plus():
    pair = nn.ParameterDict({"A": torch.ones(2, 2), "B": torch.ones(2, 2)})
    net = nn.ModuleDict({"layer": nn.ModuleDict({"trained": pair})})
    built = optimisers.build(net, SimpleNamespace(**vars(Training()), plus=16.0))
    assert [(len(group["params"]), group["lr_scale"]) for group in built.param_groups] == [(1, 1.0), (1, 16.0)]
    assert built.param_groups[1]["params"][0] is pair["B"]
