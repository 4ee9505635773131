"""P14: two gloo processes equal one with accumulation; saved by two, resumed by one, and back."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from test_guards import SETTINGS, Task, at, set_to

import train
from flux import parallel
from flux.errors import UserError
from flux.parallel import Team

SETTINGS = replace(SETTINGS, steps=6, save_every=3)


def settings(name: str, steps: int = 6):
    extra = {"optimiser": "muon", "accumulate": 4} if name == "muon" else {}
    return replace(SETTINGS, steps=steps, **extra)


class Blocks(Task):
    """With parameters that Muon takes, and one that only the second micro-step uses."""

    def __init__(self, spoil=None):
        super().__init__(spoil)
        self.model = torch.nn.ModuleDict({"blocks": self.model})
        self.model.register_parameter("late", torch.nn.Parameter(torch.ones(2)))

    def batch(self, step, micro):
        return [*super().batch(step, micro), micro]

    def loss(self, batch):
        x, weight, micro = batch
        out = self.model["blocks"](x) * (self.model.late if micro == 1 else 1)
        return (out - x[:, :2]).square().mean(1) * weight


def work(rank: int, root: Path) -> None:
    """One of two processes: everything that the tests look at, so that they are started once."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    train.train(Blocks(), settings("whole"), root / "whole")
    train.train(Blocks(), settings("muon"), root / "muon")
    train.train(Blocks(), settings("begun by two", 3), root / "begun by two")
    train.train(Blocks(), settings("begun by one"), root / "begun by one")
    said = {}
    spoil = at(4, 1, lambda task, batch: set_to(batch[0], (1, 2), float("nan")))  # the second process's
    stop = at(4, 1, lambda task, batch: (_ for _ in ()).throw(KeyboardInterrupt))
    for name, event in (("spoiled", spoil), ("interrupted", stop)):
        try:
            train.train(Blocks(event), settings(name), root / name)
        except (UserError, KeyboardInterrupt) as error:
            said[name] = repr(error)
    try:
        train.train(Blocks(), replace(SETTINGS, accumulate=3), root / "odd")
    except UserError as error:
        said["odd"] = str(error)
    (root / f"said-{rank}.json").write_text(json.dumps(said))
    parallel.leave()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    train.train(Blocks(), settings("begun by one", 3), root / "begun by one")
    processes.spawn(work, (root,), nprocs=2)
    train.train(Blocks(), settings("begun by two"), root / "begun by two")
    return root


def state(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    return {f"{file.stem}.{name}": value for file in sorted(latest.glob("*.safetensors"))
            for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["whole", "begun by two", "begun by one", "muon"])
def test_two_processes_equal_one(name, runs, tmp_path):
    train.train(Blocks(), settings(name), tmp_path)
    alone, shared = state(tmp_path), state(runs / name)
    assert alone.keys() == shared.keys() and any("late" in key for key in alone)
    for key, expected in alone.items():
        torch.testing.assert_close(shared[key], expected, rtol=1e-6, atol=1e-6, msg=key)
    for a, b in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (tmp_path, runs / name)), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) <= 2e-6


def test_what_stops_one_stops_both(runs):
    said = [json.loads((runs / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert "4-1-1.png" in said[1]["spoiled"] and "another process" in said[0]["spoiled"]
    assert all("KeyboardInterrupt" in each["interrupted"] for each in said)
    assert (runs / "spoiled" / "checkpoints" / "latest").read_text() == "step-000003"
    assert (runs / "interrupted" / "checkpoints" / "latest").read_text() == "step-000004"
    assert all("--accumulate 3 on 2 processes; expected a multiple of 2" in each["odd"] for each in said)


def test_micro_steps_are_shared_out():
    for size in (1, 2, 4):
        shares = [list(Team(rank, size).share(8)) for rank in range(size)]
        assert sorted(sum(shares, [])) == list(range(8)) and len({len(share) for share in shares}) == 1
