"""Differential training (arXiv 2412.12888): what "after" has beyond "before", as a LoRA. One way of ours, the published one,
and two to compare with; their losses are in `flux/artaug/lessons.py`:

    velocity       the pictures after were drawn by a velocity, the regions' blend, that is known at every state; the LoRA
                   learns it, at the cost of none of the regions. Where they change nothing there is nothing to learn
    two_stage      Delta_1 learns the pictures before, an anchor for what these pictures are; Delta_2 learns the pictures
                   after on base and Delta_1, both frozen, so that the difference is left to it; it is kept alone
    paired_noise   no anchor: with the same s and eps the target changes by d = z - z'
    plain          the pictures after, as any LoRA would learn them

The base is distilled: its velocity under a guidance is that of no set of pictures. A LoRA that learns a few pictures by
heart unlearns this and bends what it draws; the anchor cancels most of it, and the velocity asks for none of it.

LoRAs of several groups of pairs are averaged, exactly, and recompressed. Read `flux/flow.py`, `flux/regions.py` and
`flux/artaug/pairs.py` first.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flux import conditioning, draws, flow, latents, lora_names, parallel
from flux.artaug import drawing
from flux.artaug.drawing import Artist
from flux.artaug.lessons import TEST_EVERY, TEST_PAIRS, Pictures, Regional
from flux.artaug.pairs import digest
from flux.errors import UserError
from flux.resume import _write
from lora import algebra, inject, io
from lora.adapter import Adapter, LowRank
from vlm_client.critique import Edit, EditPlan

LEARNING = ("method", "grouping", "group", "learn_steps", "learn_batch", "lr", "rank", "target_layers", "weighting", "seed",
            "region_scale", "mode", "guidance", "steps")


@dataclass
class Stage:
    """What a training gave: the LoRA, its losses, and (step, error) of its overfit tests; why it ended."""

    adapter: Adapter
    losses: list[float] = field(default_factory=list)
    tests: list[tuple[int, float]] = field(default_factory=list)
    end: str = ""

    @property
    def failed(self) -> bool:
        """It reconstructs its own pictures no better than before it began."""
        return len(self.tests) > 1 and not self.tests[-1][1] < self.tests[0][1]


class Student:
    """The artist's transformer, learning under prompts."""

    def __init__(self, artist: Artist, settings, key: tuple):
        self.artist, self.settings, self.key = artist, settings, key
        self.network = artist.transformer

    def condition(self, prompts: Sequence[str]) -> conditioning.Condition:
        cond = self.artist.condition(prompts)
        return conditioning.condition(cond.txt.clone(), cond.vec.clone(), *self.artist.size, self.artist.guidance)

    @contextmanager
    def wearing(self, anchor: Adapter | None):
        """Frozen, beside what is learned."""
        if anchor is None:
            yield
            return
        self.artist.loras.attach("anchor", anchor)
        try:
            yield
        finally:
            self.artist.loras.detach("anchor")

    def under(self, prompts: Sequence[str]) -> flow.Velocity:
        return in_dtype(conditioning.velocity(self.network, self.condition(prompts)), self.artist.dtype)

    def learn(self, name: str, lesson: Pictures | Regional, prompts: Sequence[str], anchor: Adapter | None = None) -> Stage:
        """A fresh LoRA."""
        s, tested = self.settings, list(range(min(TEST_PAIRS, len(prompts))))
        torch.manual_seed(draws.seed_of(*self.key, name))
        with self.wearing(anchor), inject.training(self.network, s.target_layers, s.rank) as pairs:
            without = partial(switched_off, pairs)

            @torch.no_grad()
            def test() -> float:
                return lesson.test(self.under(prompts[:TEST_PAIRS]), without, tested)
            parameters = [p for pair in pairs.values() for p in (pair.A, pair.B)]
            optimiser = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0)
            stage = Stage(Adapter(), tests=[(0, test())])
            for step in range(s.learn_steps):
                optimiser.param_groups[0]["lr"] = s.lr * lesson.rate(step / s.learn_steps)
                some = self.batch(len(prompts), step, name)
                velocity = self.under([prompts[i] for i in some])
                losses = lesson.losses(velocity, without, some, draws.generator(*self.key, name, step))
                losses.mean().backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                stage.losses.append(losses.mean().item())
                if not math.isfinite(stage.losses[-1]):
                    raise UserError(f"{name}: the loss is {stage.losses[-1]} at step {step}, expected a finite one; lower "
                                    "--lr")
                if (step + 1) % TEST_EVERY == 0:
                    stage.tests.append((step + 1, test()))
                    if ended := lesson.ends([error for _, error in stage.tests]):
                        stage.end = ended
                        break
            stage.adapter = Adapter({layer: (LowRank(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scale),)
                                     for layer, pair in pairs.items()})
        return stage

    def batch(self, count: int, step: int, name: str) -> list[int]:
        """Which pairs: all of them once, in another order each time."""
        size = min(self.settings.learn_batch, count)
        epoch, at = divmod(step, count // size)
        order = draws.rng(*self.key, name, "order", epoch).permutation(count)
        return order[at * size:(at + 1) * size].tolist()


def in_dtype(velocity: flow.Velocity, dtype: torch.dtype) -> flow.Velocity:
    """Of states in float32, as a model of that dtype meets them when it draws."""
    return lambda img, t: velocity(img.to(dtype), t.to(dtype)).float()


def switched_off(pairs, velocity: flow.Velocity) -> flow.Velocity:
    """The same velocity without the LoRA in training."""
    def v(img: Tensor, t: Tensor) -> Tensor:
        for pair in pairs.values():
            pair.strength = 0.0
        try:
            return velocity(img, t)
        finally:
            for pair in pairs.values():
                pair.strength = 1.0
    return v


# --- groups, and what becomes of them ---

def groups(count: int, settings) -> list[range]:
    size = {"per_pair": 1, "joint": count, "groups": settings.group}[settings.grouping]
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def differences(artist: Artist, settings, folder: Path, pairs: tuple[list[dict], Tensor, Tensor], key: tuple
                ) -> list[Adapter]:
    """What each group teaches, trained once and kept in the folder; groups are shared out over processes."""
    rows, before, after = pairs
    team, names, parts = parallel.join(), lora_names.names(artist.preset), groups(len(rows), settings)
    artist.read([text for row in rows for text in (row["prompt"], *(edit["prompt"] for edit in row["plan"]["edits"]))])
    folder.mkdir(parents=True, exist_ok=True)
    learned = {name: value for name, value in vars(settings).items() if name in LEARNING}
    made_from = digest([learned, key, [row["sha256"] for row in rows], sorted(artist.files.items())])
    with team.together():
        for k, part in tqdm(list(enumerate(parts))[team.rank::team.size], desc=settings.method, disable=None):
            path = folder / f"group-{k:03d}.safetensors"
            if not path.exists() or json.loads(path.with_suffix(".json").read_text())["key"] != made_from:
                some = slice(part.start, part.stop)
                student = Student(artist, settings, (*key, settings.method, k))
                train_group(student, path, (rows[some], before[some], after[some]), names, made_from)
    team.wait()
    found = []
    for k in range(len(parts)):
        told = json.loads((folder / f"group-{k:03d}.json").read_text())
        if not told["left_out"]:
            found.append(io.read(folder / f"group-{k:03d}.safetensors", names)[0]["flux"])
    return found


def train_group(student: Student, path: Path, pairs: tuple[list[dict], Tensor, Tensor], names, key: str) -> None:
    """All stages of one group, into one file, and beside it what they told."""
    s, (rows, *sides) = student.settings, pairs
    before, after = (latents.pack(side).to(student.artist.place) for side in sides)
    prompts, anchor = [row["prompt"] for row in rows], None
    if s.method == "two_stage":
        anchor = student.learn("anchor", Pictures(before, s.weighting), prompts)
    if s.method == "velocity":
        lesson = regional(student.artist, s, rows, before, after)
    else:
        lesson = Pictures(after, s.weighting, before if s.method == "paired_noise" else None)
    stage = student.learn("difference", lesson, prompts, anchor and anchor.adapter)
    told = {"key": key, "left_out": bool(anchor and anchor.failed), "stages": {
        name: {"loss": [round(x, 5) for x in each.losses[::10]], "tests": each.tests, "end": each.end}
        for name, each in (("anchor", anchor), ("difference", stage)) if each}}
    if anchor and s.keep_anchor:
        io.write(path.with_name(f"{path.stem}_anchor.safetensors"), {"flux": anchor.adapter}, names)
    path.unlink(missing_ok=True)
    _write(path.with_suffix(".json"), json.dumps(told, indent=1))
    io.write(path, {"flux": stage.adapter}, names)


def regional(artist: Artist, settings, rows: Sequence[dict], before: Tensor, after: Tensor) -> Regional:
    """The lesson of pairs whose plans the manifest has: the velocity that drew them, batches in parts of as many regions."""
    prompts = [row["prompt"] for row in rows]
    plans = [drawing.areas(EditPlan(tuple(Edit(**edit) for edit in row["plan"]["edits"])), settings.region_scale)
             for row in rows]

    def taught(some: list[int]) -> flow.Velocity:
        def v(img: Tensor, t: Tensor) -> Tensor:
            out = torch.empty_like(img)
            for count in {len(plans[i]) for i in some}:
                here = [k for k, i in enumerate(some) if len(plans[i]) == count]
                part = artist.velocity([prompts[some[k]] for k in here], [plans[some[k]] for k in here], settings.mode)
                out[here] = in_dtype(part, artist.dtype)(img[here], t[here])
            return out
        return v
    return Regional(before, after, torch.tensor(artist.times[:-1]), taught)


def average(adapters: Sequence[Adapter], rank: int) -> tuple[Adapter, float]:
    """The exact mean, recompressed to `rank`; and the least share of a layer's energy that is left."""
    if not adapters:
        raise UserError("no group of pairs passed its first stage, expected one at least; raise --learn-steps or lower --lr")
    with torch.inference_mode(False), torch.no_grad():
        small, kept = algebra.recompressed(algebra.averaged(adapters), rank)
    return small, min(each.energy for each in kept.values())
