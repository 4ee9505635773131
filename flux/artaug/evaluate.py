"""Evaluation on held-out prompts and seeds: the base, and what is to be compared with it, on the same noise.

    rewrite   no LoRA: the critic's widest edit takes the prompt's place, everywhere
    regions   no LoRA: drawn again by the critic's regions, at n + 1 times the cost; what ArtAug learns from
    plain     a LoRA on the accepted pictures after, trained for as many steps; or by another method: two_stage, paired_noise
    artaug    the loop's LoRA
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

from PIL import Image
from tqdm import tqdm

from flux import cli, lora_names, parallel, pictures
from flux.artaug import differential, drawing, judging, pairs, prompts
from flux.artaug.judging import Judged
from flux.artaug.loop import folder_of, lora_hash, started, workshop
from flux.artaug.pairs import Workshop
from flux.artaug.report import interval
from flux.artaug.settings import Learning
from flux.errors import UserError
from flux.regions import Region
from flux.resume import _write
from lora import algebra, io
from lora.adapter import Adapter

WAYS, METHODS = ("rewrite", "regions"), get_args(get_type_hints(Learning)["method"])


@dataclass(frozen=True)
class Evaluate(Learning):
    """ArtAug's LoRA against the base and other ways to its gain, on prompts that nothing learned from."""

    held: int = 100  # held-out prompts
    compare: tuple[str, ...] = ()  # of rewrite, regions, and LoRAs by a method; default: rewrite, regions, plain
    strengths: tuple[float, ...] = ()  # of the LoRA; default 1
    varied: int = 6  # prompts drawn from four seeds each, for diversity; 0 leaves it out

    def run(self) -> None:
        started(self)
        known = *WAYS, *METHODS, "none"
        unknown = ", ".join(sorted({*self.compare} - {*known}))
        path = self.run_folder / "artaug.safetensors"
        if unknown:
            raise UserError(f"--compare {unknown}: expected some of {', '.join(known)}; change it")
        if not path.exists():
            raise UserError(f"{path} is not there, expected the LoRA of a loop; run python train.py artaug")
        Trial(self, workshop(self)).run(path)


class Trial:
    def __init__(self, settings: Evaluate, shop: Workshop):
        self.settings, self.shop, self.artist = settings, shop, shop.artist
        self.captions = prompts.for_checks(replace_seed(settings), settings.held)
        self.prompts = [caption.text for caption in self.captions]
        self.seeds = [settings.seed + 20_000 + i for i in range(len(self.prompts))]
        self.names = lora_names.names(self.artist.preset)

    def run(self, path: Path) -> None:
        compared, strengths = self.settings.compare or (*WAYS, "plain"), self.settings.strengths or (1.0,)
        learned = io.read(path, self.names)[0]["flux"]
        drawn = {"base": self.draw("base")}
        if set(WAYS) & set(compared):
            plans = drawing.ask(self.shop.critic, list(zip(drawn["base"], self.prompts, strict=True)))
        if "rewrite" in compared:
            said = [widest(plan, prompt) for plan, prompt in zip(plans, self.prompts, strict=True)]
            drawn["rewrite"] = self.draw("rewrite", said=said)
        if "regions" in compared:
            areas = [drawing.areas(plan, self.settings.region_scale) for plan in plans]
            drawn["regions"] = self.draw("regions", plans=areas)
        for method in (method for method in METHODS if method in compared):
            drawn[method] = self.draw(method, self.by(method))
        for strength in strengths:
            name = "artaug" if strength == 1 else f"artaug {strength:g}"
            drawn[name] = self.draw(name, learned, strength)
        if not parallel.join().leads:
            return
        self.tell({name: judging.judge(pils, self.captions, self.shop.scorer) for name, pils in drawn.items()}, learned)
        self.show(drawn)

    def draw(self, name: str, adapter: Adapter | None = None, strength: float = 1.0, said: Sequence[str] | None = None,
             plans: Sequence[Sequence[Region]] | None = None) -> list[Image.Image]:
        """Pictures that are kept in the run folder, those that are not there yet drawn; processes share them."""
        said, team = list(said or self.prompts), parallel.join()
        made_from = [self.shop.fingerprint(lora_hash(adapter) if adapter else ""), strength, said, self.seeds,
                     [[vars(area) for area in plan] for plan in plans or ()]]
        folder = self.settings.run_folder / "evaluate" / f"{name.replace(' ', '-')}-{pairs.digest(made_from)}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{i:05d}.png" for i in range(len(said))]
        self.artist.wear(adapter, strength)
        some = [part for part in drawing.chunks(len(said), pairs.PART) if not all(paths[i].exists() for i in part)]
        for part in tqdm(some[team.rank::team.size], desc=name, disable=None):
            rows = slice(part.start, part.stop)
            drawn = self.artist.draw(said[rows], self.seeds[rows], plans and plans[rows])
            for path, pil in zip(paths[rows], drawn, strict=True):
                pictures.write_png(path, pil, None)
        team.wait()
        return [pictures.read(path) for path in paths]

    def by(self, method: str) -> Adapter:
        """What the loop's accepted pairs give by another method: a LoRA per iteration on top of those before it."""
        found, whole, settings = [], Adapter(), replace(self.settings, method=method)
        while ((folder := folder_of(settings, len(found) + 1)) / "lora.safetensors").exists():
            self.artist.wear(whole)
            adapters = differential.differences(self.artist, settings, folder / method, pairs.accepted(folder),
                                                (method, settings.seed, len(found) + 1))
            found.append(differential.average(adapters, settings.rank)[0])
            whole = algebra.combined(found, [1.0] * len(found))
        return whole

    def tell(self, judged: dict[str, Judged], learned: Adapter) -> None:
        """The table, as Markdown and JSON."""
        base, rows, figures = judged["base"], [], {}
        for name, each in judged.items():
            against = judging.against(base, each)
            figures[name] = each.told() | ({} if each is base else {"against base": against})
            if self.settings.varied and name in ("base", "artaug"):
                figures[name]["diversity"] = self.diversity(None if each is base else learned)
            cells = [name, f"{each.score.mean():.2f}"]
            if each is base:
                cells += ["", "", ""]
            else:
                low, high = against["win share"]
                share = against["wins"][0] / len(self.prompts)
                cells += [interval(against["gain"]), " / ".join(map(str, against["wins"])),
                          f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"]
            cells += [f"{each.fidelity.mean():.3f}"]
            if each.right is not None:
                cells += [f"{100 * each.right.mean():.1f} %", f"{100 * each.named.mean():.1f} %"]
            rows.append(cells)
        heads = ["", "score", "gain (95 %)", "win / tie / lose", "wins (95 %)", "fidelity", "right", "all that is said"]
        lines = [heads[:len(rows[0])], ["---"] * len(rows[0]), *rows]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts = {name: {part: round(float(values.mean()), 3) for part, values in each.parts.items()}
                 for name, each in judged.items()}
        print(text)
        varied = [f"{name} {each['diversity']:.3f}" for name, each in figures.items() if "diversity" in each]
        if varied:
            print(f"diversity, mean 1 - cosine over four seeds: {', '.join(varied)}")
        run = self.settings.run_folder
        _write(run / "evaluate.md", text + "\n")
        told = {"settings": cli.as_dict(self.settings), "figures": figures, "parts": parts}
        _write(run / "evaluate.json", json.dumps(told, indent=1, default=float))

    def diversity(self, adapter: Adapter | None) -> float:
        said = [prompt for prompt in self.prompts[:self.settings.varied] for _ in range(4)]
        self.artist.wear(adapter)
        pils = list(self.artist.draw(said, range(len(said))))
        return judging.diversity(self.shop.scorer.of(pils, said)[1], 4)

    def show(self, drawn: dict[str, list[Image.Image]]) -> None:
        """The first prompts, a row for each way."""
        columns = min(8, len(self.prompts))
        pils = [pil for each in drawn.values() for pil in each[:columns]]
        marks = [f"{name}: {prompt}" for name in drawn for prompt in self.prompts[:columns]]
        path = self.settings.run_folder / "evaluate.png"
        pictures.write_png(path, pictures.contact_sheet(pils, columns, marks), None)
        print(path)


def widest(plan, prompt: str) -> str:
    """The prompt of the plan's largest edit, which stands for the critic's rewriting of the whole."""
    edits = sorted(plan.edits, key=lambda edit: (edit.box[2] - edit.box[0]) * (edit.box[3] - edit.box[1]))
    return edits[-1].prompt if edits else prompt


def replace_seed(settings):
    """Other captions than those of the loop's own checks."""
    return replace(settings, seed=settings.seed + 1)
