"""P9: a number that is not finite stops the run in its step, is named with its sample, and spoils no checkpoint."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import train
from flux import draws, resume
from flux.errors import UserError
from flux.guards import Guard
from flux.settings import Training

SETTINGS = Training(steps=8, batch=3, lr=1e-2, accumulate=2, warmup=1, ema=0.9, save_every=2, sample_every=0, device="cpu",
                    dtype="fp32")


class Task:
    """Two layers, three samples a batch. `spoil(task, batch, step, micro)` may change anything before the loss is taken."""

    def __init__(self, spoil=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.spoil = spoil or (lambda *_: None)

    def trainable(self):
        return self.model

    def names(self, step, micro):
        return [f"{step}-{micro}-{i}.png" for i in range(3)]

    def batch(self, step, micro):
        batch = [torch.randn(3, 4, generator=draws.generator("batch", step, micro)), torch.ones(3)]
        self.spoil(self, batch, step, micro)
        return batch

    def loss(self, batch):
        x, weight = batch
        return (self.model(x) - x[:, :2]).square().mean(1) * weight

    def preview(self):
        return None

    def save(self, folder):
        pass


def at(step, micro, act):
    return lambda task, batch, *now: act(task, batch) if now == (step, micro) else None


def set_to(tensor, index, value):
    with torch.no_grad():
        tensor[index] = value


def later(act):
    """A gradient's hook: what comes back is spoiled, though the loss was fine."""
    return lambda task, batch: task.model[2].weight.register_hook(lambda grad: act(grad.clone()))


def spoiled(grad):
    grad[1, 2] = math.inf
    return grad


NAN, INF = math.nan, math.inf
PLACES = {  # what is spoiled in step 5, micro-step 1 -> the words that must be there
    "a picture with nan": (lambda task, batch: set_to(batch[0], (1, 2), NAN), ("step 5", "loss is nan", "5-1-1.png")),
    "a picture with inf": (lambda task, batch: set_to(batch[0], (2, 0), INF), ("step 5", "5-1-2.png")),
    "two pictures": (lambda task, batch: set_to(batch[0], (slice(0, 2), 3), NAN), ("5-1-0.png, 5-1-1.png",)),
    "a sample's loss weight": (lambda task, batch: set_to(batch[1], 0, INF), ("step 5", "loss is inf", "5-1-0.png")),
    "a loss that overflows": (lambda task, batch: set_to(batch[0], (0, 0), 1e30), ("step 5", "loss is inf", "5-1-0.png")),
    "a weight with nan": (lambda task, batch: set_to(task.model[2].weight, (0, 1), NAN),
                          ("step 5", "weight 2.weight holds 1 of 12 numbers")),
    "a bias with inf": (lambda task, batch: set_to(task.model[2].bias, 1, -INF), ("step 5", "weight 2.bias holds 1 of 2")),
    "a gradient with inf": (later(spoiled), ("step 5", "gradient of 2.weight holds 1 of 12", "5-0-0.png, ")),
    "a gradient of nan": (later(lambda grad: grad * NAN), ("step 5", "gradient of 2.weight holds 12 of 12")),
    "a gradient too large to add up": (later(lambda grad: grad * 0 + 1e30), ("step 5", "norm inf")),
}


@pytest.mark.parametrize("place", PLACES)
def test_it_stops_in_that_step_and_says_where(place, tmp_path):
    act, words = PLACES[place]
    with pytest.raises(UserError) as caught:
        train.train(Task(at(5, 1, act)), SETTINGS, tmp_path)
    message = str(caught.value)
    assert all(word in message for word in words) and "; expected" in message and "\n" not in message, message
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert good_checkpoint(tmp_path) == 4


@pytest.mark.parametrize("kind", ["weight", "average", "optimiser"])
def test_nothing_spoiled_is_saved(kind, tmp_path, monkeypatch):
    """What the last update spoils is met by no loss before the checkpoint."""
    update = train.Ema.update

    def spoil(ema, step):
        update(ema, step)
        if step == 5:
            name, p = next(iter(ema.parameters.items()))
            target = {"weight": p, "average": ema.average[name], "optimiser": owner["adamw"].state[p]["exp_avg"]}[kind]
            set_to(target, (0, 0), NAN)
    owner = {}
    build = train.optimisers.build
    monkeypatch.setattr(train.optimisers, "build", lambda *args: owner.setdefault("adamw", build(*args)))
    monkeypatch.setattr(train.Ema, "update", spoil)
    with pytest.raises(UserError, match=f"^step 6: .*{kind}.* 0.weight holds 1 of 24 .*nothing was saved"):
        train.train(Task(), SETTINGS, tmp_path)
    assert good_checkpoint(tmp_path) == 4


def good_checkpoint(run) -> int:
    """The step of the newest checkpoint, which must hold finite numbers only."""
    model = Task().model
    parameters = dict(model.named_parameters())
    optimiser, average = torch.optim.AdamW(parameters.values()), {name: p.detach().clone() for name, p in parameters.items()}
    step = resume.load(run, "auto", parameters, optimiser, average)
    moments = [value for p in parameters.values() for value in optimiser.state[p].values()]
    assert all(tensor.isfinite().all() for tensor in (*parameters.values(), *average.values(), *moments))
    return step


def test_a_spike_is_logged_with_its_samples_and_the_run_goes_on(tmp_path):
    settings = replace(SETTINGS, steps=30, accumulate=1)
    train.train(Task(at(25, 0, lambda task, batch: batch[1].mul_(1000))), settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "spike" in row] == [26]
    assert rows[25]["spike"] == ["loss", "grad_norm", "25-0-0.png", "25-0-1.png", "25-0-2.png"]


def test_a_resumed_run_knows_what_was_usual(tmp_path):
    rows = [{"step": i + 1, "loss": 1.0, "grad_norm": 1.0} for i in range(30)]
    spike = {"step": 31, "loss": 5.0, "grad_norm": 1.0}
    assert Guard(Task(), SETTINGS, {}, tmp_path, rows).unusual(spike)["spike"][0] == "loss"
    assert Guard(Task(), SETTINGS, {}, tmp_path).unusual(spike) == {}


def test_samples_without_names_are_numbered(tmp_path):
    class Nameless(Task):
        names = property()  # hasattr says no

    with pytest.raises(UserError, match="for sample 1 of micro-step 1;"):
        train.train(Nameless(at(5, 1, PLACES["a picture with nan"][0])), SETTINGS, tmp_path)
