"""P14: two gloo processes equal one with accumulation, split or not; saved by two, resumed by one, and back."""

import json
import os
import re
import resource
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from test_guards import SETTINGS, Task, at, set_to
from test_resume import OneBatch

import train
from flux import checkpoint, parallel, resume
from flux import optimiser as optimisers
from flux.errors import UserError
from flux.parallel import Team

SETTINGS = replace(SETTINGS, steps=6, save_every=3)


def settings(name: str, steps: int = 6, **more):
    extra = {"optimiser": "muon", "accumulate": 4} if "muon" in name else {"lr": 1e-3} if name == "drawing" else {}
    return replace(SETTINGS, steps=steps, validate_every=3, **extra | more)


class Blocks(Task):
    """With parameters that Muon takes, and one that only the second micro-step uses, or all if they are to be even."""

    def __init__(self, spoil=None, even=False):
        super().__init__(spoil)
        self.even = even
        self.model = torch.nn.ModuleDict({"blocks": self.model})
        self.model.register_parameter("late", torch.nn.Parameter(torch.ones(2)))

    def batch(self, step, micro):
        return [*super().batch(step, micro), micro]

    def loss(self, batch):
        x, weight, micro = batch
        out = self.model["blocks"](x) * (self.model.late if self.even or micro == 1 else 1)
        return (out - x[:, :2]).square().mean(1) * weight


    def held_out(self):
        return [self.batch(10**6, micro) for micro in range(3)]


class Drawing(OneBatch):
    """A transformer, whose blocks are split one by one; each micro-step sees the batch at other times."""

    def batch(self, step, micro):
        return self.x0, self.eps, (self.t + 0.1 * step + 0.2 * micro) % 1

    def save(self, folder):
        checkpoint.save(folder / "final.safetensors", self.model.state_dict())


def work(rank: int, root: Path, port: str) -> None:
    """One of two processes: everything that the tests look at, so that they are started once."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    parallel.join()
    train.train(Blocks(), settings("whole"), root / "whole")
    train.train(Blocks(), settings("muon"), root / "muon")
    train.train(Blocks(), settings("begun by two", 3), root / "begun by two")
    train.train(Blocks(), settings("begun by one"), root / "begun by one")
    train.train(Blocks(even=True), settings("split", shard=True), root / "split")
    train.train(Blocks(even=True), settings("split, then by one", 3, shard=True), root / "split, then by one")
    train.train(Blocks(even=True), settings("split, then by two", 3, shard=True), root / "split, then by two")
    train.train(Blocks(even=True), settings("split, then by two"), root / "split, then by two")
    train.train(Blocks(even=True), settings("by one, then split", shard=True), root / "by one, then split")
    train.train(Drawing(), settings("drawing", shard=True, gradient_checkpointing=True), root / "drawing")
    said = {}
    spoil = at(4, 1, lambda task, batch: set_to(batch[0], (1, 2), float("nan")))  # the second process's
    stop = at(4, 1, lambda task, batch: (_ for _ in ()).throw(KeyboardInterrupt))
    for name, event in (("spoiled", spoil), ("interrupted", stop), ("spoiled split", spoil), ("interrupted split", stop)):
        try:
            train.train(Blocks(event, even=True), settings(name, shard="split" in name), root / name)
        except (UserError, KeyboardInterrupt) as error:
            said[name] = repr(error)
    for name, wrong in (("odd", {"accumulate": 3}), ("muon", {"shard": True, "optimiser": "muon"})):
        try:
            train.train(Blocks(), replace(SETTINGS, **wrong), root / "refused")
        except UserError as error:
            said[name] = str(error)
    train.train(Blocks(even=True), settings("full", 3, shard=True), root / "full")
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, most))  # as a full disk: a real write fails half-way
    optimiser = optimisers.build(Blocks().model, SETTINGS)
    try:
        task = Blocks(even=True)
        parallel.join().engine(task, shard=True)
        parameters = dict(task.model.named_parameters())
        resume.save(root / "full", 6, parameters, optimiser, parameters, team=parallel.join())
    except OSError as error:
        said["full"] = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    said["kept"] = repr(torch.distributed.nn.functional.broadcast.__defaults__)
    (root / f"said-{rank}.json").write_text(json.dumps(said))
    parallel.leave()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in each of the two: more add up in another order, which Adam makes large where a gradient is near zero."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fork_server) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    for name in ("begun by one", "by one, then split"):
        train.train(Blocks(even="split" in name), settings(name, 3), root / name)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    processes.start_processes(work, (root, port), nprocs=2, start_method="forkserver")
    for name in ("begun by two", "split, then by one"):
        train.train(Blocks(even="split" in name), settings(name), root / name)
    return root


def state(run: Path, task) -> dict[str, torch.Tensor]:
    """All numbers of the last checkpoint, whole or split, through `resume.load`."""
    parameters = dict(task.model.named_parameters())
    optimiser = optimisers.build(task.model, settings(run.name))
    average = {name: torch.zeros_like(p) for name, p in parameters.items()}
    assert resume.load(run, "auto", parameters, optimiser, average) == 6
    found = {f"model.{name}": p.detach() for name, p in parameters.items()} | average
    return found | {f"{key}.{name}": value for name, p in parameters.items() for key, value in optimiser.state[p].items()}


NAMES = ["whole", "begun by two", "begun by one", "muon", "split", "split, then by one", "split, then by two",
         "by one, then split", "drawing"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name, runs, tmp_path):
    task = Drawing() if name == "drawing" else Blocks(even="split" in name)
    train.train(task, settings(name), tmp_path / name)
    alone, shared = (state(root / name, task) for root in (tmp_path, runs))
    assert alone.keys() == shared.keys() and (name == "drawing" or any("late" in key for key in alone))
    for key, expected in alone.items():
        torch.testing.assert_close(shared[key], expected, rtol=1e-6, atol=1e-6, msg=key)
    for a, b in zip(*((run / name / "metrics.jsonl").read_text().splitlines() for run in (tmp_path, runs)), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) <= 2e-6
        assert a.keys() == b.keys() and abs(a.get("validation", 0) - b.get("validation", 0)) <= 2e-6


def test_what_was_split_was_written_in_parts_and_saved_whole(runs):
    folder = runs / "drawing" / "checkpoints"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    assert len(files) == 2 * 3 * 2, "two checkpoints of three parts by two processes"
    parts = [checkpoint.read_header(folder / file).entries["img_in.weight"].shape for file in files
             if "step-000006/model/" in file]
    assert parts == [(16, 64), (16, 64)]
    final = checkpoint.read(runs / "drawing" / "final.safetensors")
    average = state(runs / "drawing", Drawing())
    assert set(final) == set(Drawing().model.state_dict())
    for name, tensor in final.items():
        assert torch.equal(tensor, average[name]), name


@pytest.mark.parametrize("harm", ["a file too few", "a file changed", "another model"])
def test_a_broken_split_checkpoint_is_named(harm, runs, tmp_path):
    shutil.copytree(runs / "split", tmp_path, dirs_exist_ok=True)
    file = next((tmp_path / "checkpoints" / "step-000006" / "ema").glob("*.safetensors"))
    if harm == "a file too few":
        file.unlink()
    elif harm == "a file changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    task = Drawing() if harm == "another model" else Blocks()
    parameters = dict(task.model.named_parameters())
    optimiser = optimisers.build(task.model, SETTINGS)
    with pytest.raises(UserError, match="step-000006.*expected"):
        resume.load(tmp_path, "auto", parameters, optimiser, {name: torch.zeros_like(p) for name, p in parameters.items()})


def test_what_stops_one_stops_both(runs):
    said = [json.loads((runs / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    for split in ("", " split"):
        assert "4-1-1.png" in said[1][f"spoiled{split}"] and "another process" in said[0][f"spoiled{split}"]
        assert all("KeyboardInterrupt" in each[f"interrupted{split}"] for each in said)
        assert (runs / f"spoiled{split}" / "checkpoints" / "latest").read_text() == "step-000003"
        assert (runs / f"interrupted{split}" / "checkpoints" / "latest").read_text() == "step-000004"
    assert all("--accumulate 3 on 2 processes; expected a multiple of 2" in each["odd"] for each in said)
    assert all(re.search(r"no room: \d+ bytes needed", each["full"]) for each in said)
    assert sorted(os.listdir(runs / "full" / "checkpoints")) == ["latest", "step-000003"]
    assert all(each["kept"] == "(None,)" for each in said), "torch's functions keep the group, and its threads, till the end"
    assert all("muon" in each["muon"] and "expected --optimiser adamw" in each["muon"] for each in said)
    with pytest.raises(UserError, match="--shard on one process; expected several"):
        train.train(Blocks(), replace(SETTINGS, shard=True), runs / "refused")
    assert not (runs / "refused").exists()


def test_micro_steps_are_shared_out():
    for size in (1, 2, 4):
        shares = [list(Team(rank, size).share(8)) for rank in range(size)]
        assert sorted(sum(shares, [])) == list(range(8)) and len({len(share) for share in shares}) == 1
