"""The training loop and its checkpoints: what is interrupted, killed or fails goes on as if nothing had happened."""

import hashlib
import importlib.util
import itertools
import json
import os
import random
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train
from flux import data, draws, flow, latents, resume
from flux.config import TINY
from flux.data import Item
from flux.errors import UserError
from flux.model import Flux
from flux.settings import Training

SETTINGS = Training(steps=8, lr=1e-2, accumulate=2, warmup=3, schedule="cosine", weight_decay=0.1, ema=0.9, save_every=3,
                    sample_every=0, device="cpu", dtype="fp32")


class Task:
    """A small regression with everything that a resumed run could get wrong: memory layout, a frozen and an idle parameter.

    `events` are called by (step, micro) before that batch is drawn.
    """

    def __init__(self, events=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
        self.model.to(memory_format=torch.channels_last)  # optimisers keep their state in the layout of the weights
        self.model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
        self.model.register_parameter("idle", nn.Parameter(torch.ones(2)))
        self.events, self.saved = events or {}, None

    def trainable(self):
        return self.model

    def batch(self, step, micro):
        self.events.get((step, micro), lambda: None)()
        return torch.randn(5, 2, 3, 3, generator=draws.generator("batch", step, micro))

    def loss(self, x):
        return (self.model(x) - x.mean((1, 2, 3))[:, None]).square().mean()

    def preview(self):
        return None

    def save(self, folder):
        self.saved = {name: p.detach().clone() for name, p in self.model.named_parameters()}


def outcome(run: Path, task: Task) -> dict[str, torch.Tensor]:
    """All that a training leaves, as numbers: weights, what it saved, its checkpoint's files, its metrics."""
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    found = {f"weights.{name}": p.detach() for name, p in task.model.named_parameters()}
    found |= {f"saved.{name}": p for name, p in task.saved.items()}
    for file in last.glob("*.safetensors"):
        found |= {f"{file.stem}.{name}": value for name, value in load_file(file).items()}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        found |= {f"row {row['step']} {name}": torch.tensor(value, dtype=torch.float64)
                  for name, value in row.items() if name != "seconds"}
    return found


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the uninterrupted training leaves."""
    run = tmp_path_factory.mktemp("whole") / "run"
    task = Task()
    train.train(task, SETTINGS, run)
    return outcome(run, task)


def interrupt():
    raise KeyboardInterrupt


def crash():
    raise RuntimeError("crash")


def test_the_whole_run(whole):
    """Something was trained, the frozen and the idle stayed, the average is neither the start nor the end."""
    start = dict(Task().model.named_parameters())
    for name in ("0.weight", "3.weight", "3.bias"):
        assert not torch.equal(whole[f"weights.{name}"], start[name]), name
        assert not torch.equal(whole[f"saved.{name}"], whole[f"weights.{name}"]), name
        assert not torch.equal(whole[f"saved.{name}"], start[name]), name
        assert torch.equal(whole[f"saved.{name}"], whole[f"ema.{name}"]), "what is saved is the average"
        assert torch.equal(whole[f"model.{name}"], whole[f"weights.{name}"]), "and the weights are put back"
    for name in ("frozen", "idle"):
        assert torch.equal(whole[f"weights.{name}"], start[name]), name
    assert "model.frozen" not in whole
    assert [whole[f"row {step} step"].item() for step in range(1, 9)] == list(range(1, 9))
    assert whole["row 1 lr"] == pytest.approx(1e-2 / 3) and whole["row 8 lr"] < 1e-3


# Whatever stops a run, the same command ends where an uninterrupted one does.

@pytest.mark.parametrize("event", (interrupt, crash))
@pytest.mark.parametrize("micro", (0, 1))
@pytest.mark.parametrize("step", range(8))
def test_stopped_anywhere_and_resumed(step, micro, event, whole, tmp_path):
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        train.train(Task({(step, micro): event}), SETTINGS, tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == step
    saved = resume.load(tmp_path, "auto", *fresh())
    assert saved == (step if event is interrupt else step - step % 3), "Ctrl-C saves; a crash costs a save interval at most"
    task = Task()
    train.train(task, SETTINGS, tmp_path)
    assert_equal(outcome(tmp_path, task), whole)


class Pictures(Task):
    """The same on a data set of two buckets: its batches are of different sizes, and an epoch of seven batches."""

    ITEMS = [Item(Path(f"{i}.png"), size=(16, 16 + 16 * (i % 3 == 0))) for i in range(19)]
    EPOCH = 7

    def __init__(self, events=None):
        super().__init__(events)
        self.seen = []

    def batch(self, step, micro):
        super().batch(step, micro)
        items = next(data.batches(self.ITEMS, 3, 0, step * 2 + micro))
        self.seen.append((step, micro, *(str(item.path) for item in items)))
        noise = draws.generator(step, micro, "noise")
        return torch.stack([torch.full((2, 3, 3), int(item.path.stem) / 19) for item in items]) + torch.randn(
            len(items), 2, 3, 3, generator=noise)


LATE = replace(SETTINGS, steps=40, save_every=5, validate_every=7)
CUTS = [(0, 0), (0, 1), (1, 0), (2, 1), (3, 0), (3, 1), (5, 0), (7, 0), (9, 1), (10, 0), (14, 0), (17, 1)]  # step, micro


def test_twelve_cuts(hard, tmp_path):
    """P6: the first step, mid-accumulation, an epoch's edge (step 3, micro-step 1), the end of warm-up, a save, a changed
    learning rate: what comes after is bit-equal, next losses and samples included."""
    assert CUTS[5] == divmod(Pictures.EPOCH, 2)
    for changed in (False, True):
        first, settings = replace(LATE, steps=2), replace(LATE, lr=2e-3) if changed else LATE
        whole = Pictures()
        if changed:
            train.train(Pictures(), replace(first, schedule="constant"), tmp_path / "changed")
        train.train(whole, settings, tmp_path / ("changed" if changed else "whole"))
        expected = outcome(tmp_path / ("changed" if changed else "whole"), whole)
        for step, micro in itertools.product(range(20), (0, 1)) if hard else CUTS:
            if changed and step < 2:
                continue
            run = tmp_path / f"{changed} {step} {micro}"
            if changed:
                train.train(Pictures(), replace(first, schedule="constant"), run)
            for event in (interrupt, crash) if hard else ((interrupt, crash)[(step + micro) % 2],):
                with pytest.raises((KeyboardInterrupt, RuntimeError)):
                    train.train(Pictures({(step, micro): event}), settings, run)
            task = Pictures()
            train.train(task, settings, run)
            assert_equal(outcome(run, task), expected)
            assert task.seen == whole.seen[-len(task.seen):] and len(task.seen) >= 40, "the samples of the next 20 steps"


def test_stopped_at_every_step(whole, tmp_path):
    for step in range(8):
        with pytest.raises(KeyboardInterrupt):
            train.train(Task({(step, 1): interrupt}), SETTINGS, tmp_path)
    task = Task()
    train.train(task, SETTINGS, tmp_path)
    assert_equal(outcome(tmp_path, task), whole)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ("forward pass", "between update and average", "save"))
def test_signals_wait_for_a_state_worth_saving(number, moment, whole, tmp_path, monkeypatch):
    """A signal may come between the optimiser's step and the average's, where the state is that of no step."""
    def unheard(number, frame):
        raise AssertionError("the loop does not handle this signal")

    def send():
        os.kill(os.getpid(), number)

    def once(function):
        def called(*args, **kwargs):
            if calls.append(0) or len(calls) == 2:
                send()
            return function(*args, **kwargs)
        calls = []
        return called

    before = signal.signal(signal.SIGTERM, unheard)
    try:
        if moment == "between update and average":
            monkeypatch.setattr(train.Ema, "update", once(train.Ema.update))
        elif moment == "save":
            monkeypatch.setattr(resume, "save", once(resume.save))
        with pytest.raises(KeyboardInterrupt):
            train.train(Task({(4, 1): send} if moment == "forward pass" else None), SETTINGS, tmp_path)
        assert signal.getsignal(signal.SIGTERM) is unheard, "handlers are put back"
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    task = Task()
    train.train(task, SETTINGS, tmp_path)
    assert_equal(outcome(tmp_path, task), whole)


def test_the_plot_comes_with_every_checkpoint(tmp_path):
    """Without samples too."""
    with pytest.raises(KeyboardInterrupt):
        train.train(Task({(4, 0): interrupt}), SETTINGS, tmp_path)
    assert SETTINGS.sample_every == 0 and (tmp_path / "loss.png").exists() and not (tmp_path / "samples").exists()


def test_a_finished_run_only_saves_again(whole, tmp_path):
    for _ in range(2):
        task = Task()
        train.train(task, SETTINGS, tmp_path)
        assert_equal(outcome(tmp_path, task), whole)


def test_a_longer_run_goes_on(whole, tmp_path):
    """Without a cosine, which knows the end, more steps later are more steps at once."""
    settings = replace(SETTINGS, schedule="constant")
    train.train(Task(), replace(settings, steps=5), tmp_path / "parts")
    parts, once = Task(), Task()
    train.train(parts, settings, tmp_path / "parts")
    train.train(once, settings, tmp_path / "once")
    assert_equal(outcome(tmp_path / "parts", parts), outcome(tmp_path / "once", once))


def test_resuming_from_a_named_checkpoint_or_from_none(whole, tmp_path):
    train.train(Task(), SETTINGS, tmp_path)
    for how in (str(tmp_path / "checkpoints" / "step-000003"), "none"):
        task = Task()
        train.train(task, replace(SETTINGS, resume=how, keep=1), tmp_path)
        assert_equal(outcome(tmp_path, task), whole)
        train.train(Task(), SETTINGS, tmp_path)
        assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-000008"]
        train.train(Task(), replace(SETTINGS, resume="none"), tmp_path)


def test_starting_anew_over_a_longer_run(tmp_path):
    """The newest checkpoints are those written last, not those with the most steps."""
    train.train(Task(), replace(SETTINGS, steps=20), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train.train(Task({(5, 0): interrupt}), replace(SETTINGS, resume="none", keep=1), tmp_path)
    assert os.listdir(tmp_path / "checkpoints" / "step-000005")
    assert resume.load(tmp_path, "auto", *fresh()) == 5


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    resume.cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"ste')
    resume.cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n'
    resume.cut_metrics(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "new.jsonl"]


def test_the_learning_rate():
    constant = replace(SETTINGS, schedule="constant", warmup=4, steps=100, lr=1.0)
    assert [train.learning_rate(step, constant) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = replace(constant, schedule="cosine", warmup=0)
    assert [train.learning_rate(step, cosine) for step in (0, 50, 100)] == pytest.approx([1, 0.505, 0.01])


def test_the_average():
    """Its decay rises as (1 + step) / (10 + step) to the one asked for; it is lent to the model and taken back."""
    p = torch.zeros(2)
    ema = train.Ema({"p": p}, 0.5)
    p.fill_(1.0)
    expected = 0.0
    for step, decay in ((0, 0.1), (2, 0.25), (90, 0.5)):
        ema.update(step)
        expected = decay * expected + (1 - decay)
        assert ema.average["p"].tolist() == pytest.approx([expected] * 2)
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(p, ema.average["p"])
        crash()
    assert p.tolist() == [1, 1]


class Early(Task):
    ahead = True


def test_batches_made_ahead_are_the_same(whole, tmp_path):
    """In whatever step it stops; what a batch raises comes in the step that asks for it."""
    for step in (2, 5):
        with pytest.raises(RuntimeError):
            train.train(Early({(step, 1): crash}), SETTINGS, tmp_path)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    task = Early()
    train.train(task, SETTINGS, tmp_path)
    assert_equal(outcome(tmp_path, task), whole)


class Validated(Task):
    def held_out(self):
        return [self.batch("held out", micro) for micro in range(3)]


def test_the_validation_loss(tmp_path):
    """Of the averaged weights, on the same batches each time; it changes nothing, and is the mean over the batches."""
    settings = replace(SETTINGS, validate_every=3)
    task, plain = Validated(), Task()
    train.train(task, settings, tmp_path / "validated")
    train.train(plain, settings, tmp_path / "plain")
    rows = [json.loads(row) for row in (tmp_path / "validated" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation" in row] == [3, 6, 8]
    for (name, p), other in zip(task.saved.items(), plain.saved.values(), strict=True):
        assert torch.equal(p, other), name
        task.model.get_parameter(name).data.copy_(p)
    expected = sum(task.loss(batch).item() for batch in task.held_out()) / 3
    assert rows[-1]["validation"] == pytest.approx(expected, rel=1e-6)


def test_tensorboard(tmp_path):
    settings = replace(SETTINGS, tensorboard=True)
    if importlib.util.find_spec("tensorboard"):
        train.train(Task(), settings, tmp_path)
        assert list((tmp_path / "tensorboard").glob("events*"))
    else:
        with pytest.raises(UserError, match=r"--tensorboard.*pip install -e .*tensorboard"):
            train.train(Task(), settings, tmp_path)


# Checkpoints.

def fresh():
    """Parameters, optimiser and average of a task, as `save` and `load` take them."""
    parameters = dict(Task().model.named_parameters())
    parameters.pop("frozen")
    optimiser = torch.optim.AdamW(parameters.values(), fused=True)
    return parameters, optimiser, {name: p.detach().clone() for name, p in parameters.items()}


def small(seed: int = 0, sizes: tuple[int, ...] = (3, 4)):
    """The same for a few vectors, after a step of the optimiser."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {f"p{i}": nn.Parameter(torch.randn(size, generator=generator)) for i, size in enumerate(sizes)}
    optimiser = torch.optim.AdamW(parameters.values(), fused=True)
    sum(p.square().sum() for p in parameters.values()).backward()
    optimiser.step()
    return parameters, optimiser, {name: p.detach() / 2 for name, p in parameters.items()}


def state(parameters, optimiser, average) -> dict[str, torch.Tensor]:
    moments = {f"{name}.{key}": value.clone() for name, p in parameters.items() for key, value in optimiser.state[p].items()}
    return ({name: p.detach().clone() for name, p in parameters.items()} | moments
            | {f"average.{name}": value.clone() for name, value in average.items()})


def test_what_is_saved_is_loaded(tmp_path):
    one, two = small(0), small(1)
    folder = resume.save(tmp_path, 7, *one)
    assert sorted(os.listdir(folder)) == ["ema.safetensors", "manifest.json", "model.safetensors", "optimiser.safetensors"]
    assert resume.load(tmp_path, "auto", *two) == 7
    assert_equal(state(*two), state(*one))
    assert resume.load(tmp_path / "elsewhere", str(folder), *small(2)) == 7
    assert resume.load(tmp_path / "elsewhere", "auto", *small(2)) == 0
    untouched = small(1)
    assert resume.load(tmp_path, "none", *untouched) == 0
    assert_equal(state(*untouched), state(*small(1)))


def test_loading_copies(tmp_path):
    """What was loaded does not change with the file, nor the file with it."""
    folder = resume.save(tmp_path, 1, *small(0))
    loaded = small(1)
    resume.load(tmp_path, "auto", *loaded)
    before, files = state(*loaded), {file: file.read_bytes() for file in folder.iterdir()}
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.seek(-8, os.SEEK_END)
            handle.write(b"\0" * 8)
    assert_equal(state(*loaded), before)
    for file, content in files.items():
        file.write_bytes(content)
    sum(p.square().sum() for p in loaded[0].values()).backward()
    loaded[1].step()
    assert all(file.read_bytes() == content for file, content in files.items())


def test_settings_that_changed_are_said(tmp_path, capsys):
    train.train(Task(), replace(SETTINGS, steps=3), tmp_path)
    assert "going on" not in capsys.readouterr().err
    train.train(Task(), replace(SETTINGS, lr=3e-2), tmp_path)
    assert "going on from step 3 with steps 8 (was 3), lr 0.03 (was 0.01)\n" in capsys.readouterr().err


@pytest.mark.parametrize("keep", (1, 2, 5))
def test_keep(keep, tmp_path):
    for step in range(1, 5):
        resume.save(tmp_path, step, *small(step), keep=keep)
        names = sorted(os.listdir(tmp_path / "checkpoints"))
        assert names == ["latest", *(f"step-{s:06d}" for s in range(max(1, step - keep + 1), step + 1))]
    assert resume.load(tmp_path, "auto", *small(0)) == 4


def test_a_million_steps(tmp_path):
    for step in (999_999, 1_000_000):
        resume.save(tmp_path, step, *small(0), keep=1)
    assert resume.load(tmp_path, "auto", *small(1)) == 1_000_000


def other_tensors(name, change):
    def apply(folder):
        tensors = change(load_file(folder / name))
        save_file(tensors, folder / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return apply


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def scribbled(folder):
    """The right size, other bytes."""
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def flipped(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def removed(name):
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "no manifest": removed("manifest.json"),
    "empty manifest": cut("manifest.json", 0),
    "half a manifest": cut("manifest.json", 20),
    "manifest of other things": written("manifest.json", b'["step"]'),
    "manifest without files": written("manifest.json", b'{"step": 3}'),
    "manifest of no files": written("manifest.json", b'{"step": 3, "files": {}}'),
    "manifest of files without hashes": written("manifest.json", b'{"step": 3, "files": {"model.safetensors": 8}}'),
    "manifest that is no text": written("manifest.json", b"\xff\xfe"),
    "no weights": removed("model.safetensors"),
    "no average": removed("ema.safetensors"),
    "no moments": removed("optimiser.safetensors"),
    "weights cut short": cut("model.safetensors", 50),
    "moments cut short": cut("optimiser.safetensors", 50),
    "weights overwritten": scribbled,
    "one bit of a weight flipped": flipped,
    "another model's names": other_tensors("model.safetensors", lambda t: {f"x.{name}": v for name, v in t.items()}),
    "a weight too few": other_tensors("model.safetensors", lambda t: {"p0": t["p0"]}),
    "a weight too many": other_tensors("model.safetensors", lambda t: t | {"p2": torch.ones(3)}),
    "another model's shapes": other_tensors("model.safetensors", lambda t: t | {"p1": torch.ones(5)}),
    "a shape that broadcasts": other_tensors("model.safetensors", lambda t: t | {"p1": torch.ones(1)}),
    "another model's average": other_tensors("ema.safetensors", lambda t: {"p0": t["p0"], "p2": t["p1"]}),
    "another optimiser's moments": other_tensors("optimiser.safetensors", lambda t: {
        name: v for name, v in t.items() if not name.startswith("exp_avg_sq")}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_named_and_changes_nothing(broken, tmp_path):
    BROKEN[broken](resume.save(tmp_path, 3, *small(0)))
    for how in ("auto", str(tmp_path / "checkpoints" / "step-000003")):
        target = small(1)
        before = state(*target)
        with pytest.raises(UserError) as caught:
            resume.load(tmp_path, how, *target)
        words = str(caught.value)
        assert "step-000003" in words and "; expected" in words and "\n" not in words, words
        assert_equal(state(*target), before)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere.*--resume"):
        resume.load(tmp_path, str(tmp_path / "nowhere"), *small(0))


# A save that fails, or that is killed.

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def watch(act) -> None:
    """Call act(path) before every operation on a file, for the rest of this process: there is no way to end a hook."""
    def hook(event, args):
        if event in OPERATIONS and isinstance(args[0], (str, os.PathLike)):
            act(os.fspath(args[0]))
    sys.addaudithook(hook)


def concerns(run: Path, path: str) -> bool:
    """A file of the run's checkpoints; shutil.rmtree names what is inside by its last part alone."""
    return str(run / "checkpoints") in path or path in FILES


FILES = ("ema.safetensors", "manifest.json", "model.safetensors", "optimiser.safetensors")


@pytest.fixture(scope="module")
def failing():
    """A dict to be filled: the operation numbered `left`, counted from now, on files of `run` raises `error`."""
    plan = {"run": None}

    def fail(path):
        if plan["run"] and concerns(plan["run"], path):
            plan["left"] -= 1
            if plan["left"] == 0:
                raise plan["error"]
    watch(fail)
    yield plan
    plan["run"] = None


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()), ids=("ENOSPC", "Ctrl-C"))
@pytest.mark.parametrize("step", (6, 3), ids=("next step", "same step"))
def test_a_save_that_fails_anywhere(step, error, failing, tmp_path):
    """Before it is whole, the previous checkpoint is the newest; and there is nothing beside checkpoints."""
    for n in range(1, 100):
        run, old, new = tmp_path / str(n), small(0), small(1)
        resume.save(run, 3, *old)
        failing.update(run=run, left=n, error=error)
        with suppress(type(error)):
            resume.save(run, step, *new, keep=1)
        failing["run"] = None
        loaded = small(2)
        assert resume.load(run, "auto", *loaded) in (3, step)
        is_new = torch.equal(loaded[0]["p0"], new[0]["p0"])
        assert_equal(state(*loaded), state(*new if is_new else old))
        assert set(os.listdir(run / "checkpoints")) <= {"latest", "step-000003", "step-000003-old", "step-000006"}, n
        if failing["left"] > 0:
            break
    assert n > 10 and is_new and sorted(os.listdir(run / "checkpoints")) == ["latest", f"step-{step:06d}"]


def test_a_disk_that_fills_up(tmp_path):
    """A real write that fails half-way: the system limits the size of files."""
    resume.save(tmp_path, 3, *small(0))
    large = small(1, sizes=(100_000, 4))
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OSError, match=r"\d+ bytes needed"):
            resume.save(tmp_path, 6, *large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000003"]
    loaded = small(2)
    assert resume.load(tmp_path, "auto", *loaded) == 3
    assert_equal(state(*loaded), state(*small(0)))


LONG = replace(SETTINGS, steps=60, accumulate=1, save_every=4, keep=2)


def doomed(run: Path, operation: int, seconds: float) -> None:
    """A training that dies, at once and without a word, at a file operation or after some seconds of work; or ends."""
    torch.set_num_threads(1)
    if operation:
        count = itertools.count(1)
        watch(lambda path: concerns(run, path) and next(count) == operation and os.kill(os.getpid(), signal.SIGKILL))
    if seconds:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF's default ends the process as kill -9 does
    task = Task()
    train.train(task, LONG, run)
    save_file({name: p.contiguous() for name, p in outcome(run, task).items()}, run / "outcome.safetensors")


def test_killed_at_random_times(tmp_path, hard, fork_server):
    """P5. Half of the kills are inside a save."""
    def start(run, operation=0, seconds=0.0):
        process = fork_server.Process(target=doomed, args=(run, operation, seconds))
        process.start()
        process.join(60)
        return process.exitcode

    assert start(tmp_path / "whole") == 0
    expected = load_file(tmp_path / "whole" / "outcome.safetensors")
    dice, kills, run = random.Random(0), 0, tmp_path / "run 0"
    while kills < (2000 if hard else 30):
        inside = kills % 2
        code = start(run, dice.randint(1, 60) if inside else 0, 0.0 if inside else dice.uniform(0.001, 0.25))
        if code == 0:  # it came to its end before it was to die
            assert_equal(load_file(run / "outcome.safetensors"), expected)
            run = tmp_path / f"run {kills}"
            continue
        assert code in (-signal.SIGKILL, -signal.SIGPROF)
        kills += 1
        rows = run / "metrics.jsonl"
        done = len(rows.read_text().splitlines()) if rows.exists() else 0
        saved = resume.load(run, "auto", *fresh())
        assert done - saved <= LONG.save_every, "at most one save interval is lost"
        if (run / "checkpoints").exists():
            assert [path.name for path in (run / "checkpoints").glob(".step*")] == [], "no leftovers after the next start"
    assert start(run) == 0
    assert_equal(load_file(run / "outcome.safetensors"), expected)
    assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-000056", "step-000060"]


# Draws.

def test_draws_are_the_same_everywhere():
    """Recorded on one machine: no process, version or platform may change what a seed means."""
    assert draws.seed_of(0, 12, 3, "noise") == 8788099829047075067
    assert draws.generator(0, "noise").initial_seed() == draws.seed_of(0, "noise")
    assert torch.randn(3, generator=draws.generator(0, 5, "noise")).tolist() == pytest.approx(
        [-0.1109479, 0.6006829, 0.7050851], abs=1e-6)
    assert draws.rng(0, 5, "order").permutation(8).tolist() == [3, 6, 2, 4, 0, 7, 1, 5]


def test_draws_differ_by_every_part_of_their_key():
    keys = [(seed, step, micro, use) for seed in range(3) for step in range(12) for micro in range(12)
            for use in ("noise", "times")]
    assert len({draws.seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= draws.seed_of(*key) < 2**63 for key in keys)
    assert draws.seed_of(1, 12) != draws.seed_of(11, 2)


# A transformer learns.

class OneBatch:
    """Velocity at fixed points of fixed paths, for a tiny transformer."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Flux(TINY)
        g = draws.generator("one batch")
        self.x0, self.eps = torch.randn(2, 2, 6, 64, generator=g)
        self.txt, self.vec = torch.randn(2, 3, 28, generator=g), torch.randn(2, 24, generator=g)
        self.t = torch.tensor([0.3, 0.7])

    def trainable(self):
        return self.model

    def batch(self, step, micro):
        return self.x0, self.eps, self.t

    def loss(self, batch):
        ids, guidance = (latents.image_ids(4, 6), self.txt, latents.text_ids(3)), torch.ones(2)
        return flow.loss(lambda img, t: self.model(img, *ids, self.vec, t, guidance), *batch).mean()

    def preview(self):
        return None

    def save(self, folder):
        pass


def test_a_tiny_transformer_learns_one_batch(tmp_path):
    settings = Training(steps=200, lr=3e-3, warmup=10, save_every=200, sample_every=0, device="cpu")
    train.train(OneBatch(), settings, tmp_path)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 200 and 1 < losses[0] < 4 and losses[-1] < losses[0] / 5, (losses[0], losses[-1])


def test_a_full_disk_is_told_by_a_process_whose_draft_another_has_removed(tmp_path, monkeypatch):
    from torch.distributed import checkpoint as dcp

    def full(*args, **kwargs):
        raise dcp.CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})
    monkeypatch.setattr(dcp, "save", full)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(OSError, match=r"no room: 40 bytes needed, \d+ free"):
        resume._write_split(tmp_path / "checkpoints" / "draft", {"weight": torch.zeros(10)})
