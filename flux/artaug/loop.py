"""The outer loop: pairs, their filter, what they teach, and again with that LoRA worn, until there is nothing to gain.

Everything lies in the run folder; each stage looks for what is there, so the command that was killed goes on where it was:

    iteration-1/pictures, part-*.json, part-*.safetensors   pairs; manifest.jsonl decides; review.csv may overrule it
    iteration-1/groups/                                     a LoRA per group of pairs
    iteration-1/lora.safetensors, check.json                their average; figures on prompts that nothing learns from
    artaug.safetensors, report.html, table.md               all iterations as one LoRA; what happened
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from flux import cli, lora_names, parallel
from flux.artaug import differential, drawing, judging, pairs, prompts, report, scorers, statistics
from flux.artaug.drawing import Artist
from flux.artaug.pairs import Workshop
from flux.artaug.settings import Learning, Making
from flux.errors import UserError
from flux.resume import _write
from lora import algebra, io
from lora.adapter import Adapter
from lora.metadata import about
from vlm_client.critique import MAX_REGIONS

ACCEPTED = 0.005  # least share of pairs that an iteration must accept
GUESS = 2.0  # regions of a picture, before any plan is known


@dataclass(frozen=True)
class Pairs(Making):
    """Pairs of one iteration and the filter over them, without any training."""

    iteration: int = 1  # which prompts and folder

    def run(self) -> None:
        started(self)
        shop = workshop(self)
        worn = before(self, shop.artist, self.iteration)
        shop.artist.wear(worn)
        rows = pairs_of(shop, self.iteration, lora_hash(worn))
        if parallel.join().leads:
            print(f"{len(rows)} rows are in {folder_of(self, self.iteration) / 'manifest.jsonl'}")


@dataclass(frozen=True)
class Learn(Learning):
    """The difference that accepted pairs of one iteration teach, as a LoRA; pairs are there already."""

    iteration: int = 1  # whose pairs

    def run(self) -> None:
        started(self)
        artist = Artist(self)
        artist.wear(before(self, artist, self.iteration))
        adapter, kept = learned(artist, self, self.iteration)
        if parallel.join().leads:
            print(f"{folder_of(self, self.iteration) / 'lora.safetensors'}: {len(adapter.layers)} layers, {kept:.1%} of the "
                  "average's energy or more in each")


@dataclass(frozen=True)
class Loop(Learning):
    """The whole loop, from prompts to artaug.safetensors and a report; goes on where it was stopped."""

    iterations: int = 1  # at most
    strength: float = 1.0  # of each iteration's LoRA in the end
    checks: int = 32  # held-out prompts on which each iteration is measured
    fall: float | None = None  # share of held-out fidelity whose loss leaves an iteration out; default: 0.005, demo 0.2

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1 or self.checks < 2:
            raise UserError(f"--iterations {self.iterations} --checks {self.checks}: expected 1 and 2 or more")

    @property
    def most_fall(self) -> float:
        """The demo's pair of towers takes what a caption leaves unsaid for a difference, such as a gradient or a light."""
        return self.fall if self.fall is not None else 0.2 if self.model.partition("-")[0] == "demo" else 0.005

    def run(self) -> None:
        started(self)
        run, team, begun = self.run_folder, parallel.join(), time.time()
        for i in range(1, self.iterations + 1):
            prompts.of_iteration(self, i)  # a file that is too short is told at once
        shop = workshop(self)
        if team.leads:
            cli.write_toml(run / "config.toml", self, "python train.py artaug")
            print(cost(self, shop.artist), flush=True)
        worn, history, stop = Adapter(), [], ""
        for iteration in range(1, self.iterations + 1):
            shop.artist.wear(worn)
            rows = pairs_of(shop, iteration, lora_hash(worn))
            stop = exhausted(rows)
            if not stop:
                adapter, kept = learned(shop.artist, self, iteration)
                candidate = algebra.combined([worn, adapter], [1.0, self.strength]) if worn.layers else \
                    algebra.combined([adapter], [self.strength])
                with team.together():
                    if team.leads:
                        checked(shop, self, iteration, candidate)
                check = json.loads((folder_of(self, iteration) / "check.json").read_text())
                history.append({"iteration": iteration, "energy": kept, **check})
                stop = spoiled(check, self.most_fall)
            if not stop:
                worn = candidate
            with team.together():
                if team.leads and worn.layers:
                    publish(self, shop.artist, worn, iteration)
            if team.leads:
                report.write(run, history, stop, self, time.time() - begun)
            if stop:
                break
        if team.leads:
            print(f"{stop or f'{self.iterations} iterations done'}; {shop.artist.passes} passes here, "
                  f"{time.time() - begun:.0f} s; the report is in {run / 'report.html'}")
            if worn.layers:
                print(f"draw with it: python sample.py --model {self.model} --lora {run / 'artaug.safetensors'} ...")


def started(settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.run_folder.mkdir(parents=True, exist_ok=True)


def folder_of(settings, iteration: int) -> Path:
    return settings.run_folder / f"iteration-{iteration}"


def workshop(settings) -> Workshop:
    if not settings.vlm:
        raise UserError("--vlm is missing, expected the address of a critic; start python -m vlm_client.measuring, or a "
                        "Qwen2-VL server, and add --vlm http://localhost:8000")
    artist = Artist(settings)
    return Workshop(settings, artist, scorers.choose(artist, settings), drawing.critic(settings))


def before(settings, artist: Artist, iteration: int) -> Adapter:
    """What the base wears in an iteration: the LoRAs of those before it."""
    paths = [folder_of(settings, i) / "lora.safetensors" for i in range(1, iteration)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there, expected the LoRA of every iteration before {iteration}; learn it first")
    names = lora_names.names(artist.preset)
    return algebra.combined([io.read(path, names)[0]["flux"] for path in paths], [1.0] * len(paths))


def pairs_of(shop: Workshop, iteration: int, worn: str) -> list[dict]:
    """Pairs that are not there yet, then the decision over all. Every process gets the rows."""
    folder, team = folder_of(shop.settings, iteration), parallel.join()
    begun = time.time()
    pairs.make(shop, folder, iteration, prompts.of_iteration(shop.settings, iteration), worn)
    with team.together():
        if team.leads:
            rows = pairs.decide(shop, folder)
            print(f"iteration {iteration}: {len(rows)} pairs by {rows[0]['critic']}, "
                  f"{sum(row['decision'] == 'accepted' for row in rows)} accepted, {time.time() - begun:.0f} s", flush=True)
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def learned(artist: Artist, settings, iteration: int) -> tuple[Adapter, float]:
    """The iteration's LoRA: of each group, averaged, recompressed, written; and the energy that this left."""
    folder, begun = folder_of(settings, iteration), time.time()
    if not (folder / "manifest.jsonl").exists():
        raise UserError(f"{folder} has no manifest.jsonl, expected pairs; make them first: python train.py artaug pairs")
    chosen = pairs.accepted(folder)
    if not chosen[0]:
        raise UserError(f"{folder}/manifest.jsonl accepts no pair, expected one at least; look at its reasons, then lower "
                        "--gain or write accept into review.csv")
    found = differential.differences(artist, settings, folder / "groups", chosen, ("learn", settings.seed, iteration))
    adapter, kept = differential.average(found, settings.rank)
    if parallel.join().leads:
        save(folder / "lora.safetensors", artist, adapter, settings, {"iteration": iteration, "pairs": len(chosen[0])})
        print(f"iteration {iteration}: {len(found)} LoRAs from {len(chosen[0])} pairs averaged, "
              f"{time.time() - begun:.0f} s", flush=True)
    return adapter, kept


def save(path: Path, artist: Artist, adapter: Adapter, settings, made: dict) -> None:
    meta = about(adapter, path.stem, settings.model, made | {"command": "python train.py artaug",
                                                             "config": cli.as_dict(settings), "base": artist.files})
    io.write(path, {"flux": adapter}, lora_names.names(artist.preset), metadata=meta)


def publish(settings, artist: Artist, worn: Adapter, iterations: int) -> None:
    """All iterations side by side as one LoRA, in bfloat16: each was learned on top of those before it."""
    ids = [row["id"] for i in range(1, iterations + 1) for row in pairs.accepted(folder_of(settings, i))[0]]
    with torch.inference_mode(False), torch.no_grad():
        whole, _ = algebra.recompressed(worn, settings.rank * iterations)
    half = Adapter({layer: tuple(type(term)(term.A.bfloat16(), term.B.bfloat16(), term.scale, term.start) for term in terms)
                    for layer, terms in whole.layers.items()})
    save(settings.run_folder / "artaug.safetensors", artist, half, settings,
         {"iterations": iterations, "pairs": pairs.digest(ids)})


def lora_hash(adapter: Adapter) -> str:
    """Of its numbers; "" for none."""
    sums = [[layer, [[float(x.double().sum()) for x in (term.A, term.B)] + [term.scale] for term in terms]]
            for layer, terms in adapter.layers.items()]
    return pairs.digest(sums) if sums else ""


# --- when to stop ---

def exhausted(rows: list[dict]) -> str:
    """Why an iteration with these pairs is the last, "" if it is not."""
    share = sum(row["decision"] == "accepted" for row in rows) / len(rows)
    if share < ACCEPTED:
        return f"stopped: {share:.2%} of the pairs were accepted, less than {ACCEPTED:.1%}"
    mean, low, high = statistics.interval([row["gains"]["aesthetic"] for row in rows])
    if low <= 0:
        return f"stopped: the critic's advice gains nothing any more, {mean:.3f} ({low:.3f} to {high:.3f}) before the filter"
    return ""


def spoiled(check: dict, most: float) -> str:
    lost = 1 - check["fidelity"] / check["base fidelity"]
    return f"stopped: fidelity on held-out prompts fell by {lost:.2%}; iteration left out" if lost > most else ""


def checked(shop: Workshop, settings, iteration: int, adapter: Adapter) -> dict:
    """Figures of the base and of the LoRA so far, on held-out prompts and the same noise."""
    path = folder_of(settings, iteration) / "check.json"
    key = pairs.digest([lora_hash(adapter), settings.checks, shop.fingerprint("")])
    if path.exists() and (found := json.loads(path.read_text()))["key"] == key:
        return found
    captions = prompts.for_checks(settings, settings.checks)
    said = [caption.text for caption in captions]
    seeds = [(settings.seed + 10_000 + i) for i in range(len(said))]

    def judged(worn: Adapter | None) -> judging.Judged:
        shop.artist.wear(worn)
        return judging.judge(list(shop.artist.draw(said, seeds)), captions, shop.scorer)
    shop.base = base = shop.base or judged(None)
    other = judged(adapter)
    figures = judging.against(base, other)
    told = {"key": key, "score": float(other.score.mean()), "base score": float(base.score.mean()),
            "fidelity": float(other.fidelity.mean()), "base fidelity": float(base.fidelity.mean()), "against": figures,
            "base": base.told(), "figures": other.told()}
    _write(path, json.dumps(told, indent=1, default=float))
    return told


# --- what it costs ---

def cost(settings, artist: Artist) -> str:
    """Passes and seconds of one run, before it begins: pictures, training and checks, as timed on two steps."""
    more = 0 if settings.mode == "attention" else GUESS
    drawn = settings.iterations * settings.count * artist.steps * (2 + more)
    a_step = {"velocity": 3 + 1 + more, "two_stage": 2 * 3, "paired_noise": 3 + 1, "plain": 3}[settings.method]
    most = min(settings.target, settings.count)
    taught = {"groups": -(-most // settings.group), "per_pair": most, "joint": 1}[settings.grouping]
    learned_passes = a_step * settings.iterations * taught * settings.learn_steps * settings.learn_batch
    checks = (settings.iterations + 1) * settings.checks * artist.steps
    pace = timed(artist, settings.batch)
    total = drawn + learned_passes + checks
    return (f"cost: {drawn:,.0f} passes for {settings.iterations} x {settings.count} pairs of {artist.steps} steps with "
            f"{GUESS:g} regions each (at most {MAX_REGIONS}), at most {learned_passes:,.0f} to learn by {settings.method} "
            f"({a_step:g} for a picture of a step), {checks:,} for checks; {1000 * pace:.1f} ms a pass: at most "
            f"{total * pace / 60:.0f} minutes and the critic's")


def timed(artist: Artist, batch: int) -> float:
    """Seconds of a pass, of the second of two steps of a batch."""
    artist.read(["a"])
    with torch.inference_mode():
        v = artist.under(["a"] * batch)
        img = torch.zeros(batch, artist.size[0] * artist.size[1] // 256, 64, dtype=artist.dtype, device=artist.place)
        for _ in range(2):
            begun = time.perf_counter()
            v(img, torch.ones(batch, dtype=artist.dtype, device=artist.place)).sum().item()
    return (time.perf_counter() - begun) / batch
