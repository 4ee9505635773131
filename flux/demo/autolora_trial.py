"""How well AutoLoRA finds LoRAs in the demo's pool, and how well they work together: python train.py autolora evaluate."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flux import checkpoint, fusion, lora_names, lora_search, pictures, weights
from flux.config import DEMO
from flux.demo import fusion_trial
from flux.demo.fusion_trial import Case, Studio, cases, table, trial
from flux.demo.pool import Entry, entry_of
from flux.errors import UserError
from flux.lora_search import Member, Searcher
from flux.retriever import kept_apart
from lora import algebra, contrast, io
from lora.adapter import Adapter
from lora.fuse import RULES


@dataclass(frozen=True)
class Evaluate:
    """Retrieval by captions that training never saw, and fusion on pairs that no gate was trained on."""

    part: Literal["all", "retrieval", "fusion", "cost"] = "all"
    pool: Path = weights.DEMO / "pool"  # folder of LoRAs with index.json
    encoder: Path = weights.DEMO / fusion.ENCODER  # of LoRAs, for retrieval
    gates: Path = fusion.SHIPPED  # for fusion; the encoder beside them tells them what a LoRA is
    numbers: tuple[int, ...] = ()  # of LoRAs at once; default 1, 2, 3, 4, 5: an object, a style, and others that distract
    rules: tuple[str, ...] = ()  # of lora/fuse.py; default: all
    ablate: bool = True         # two LoRAs also with each term of the gates left out
    count: int = 32             # sets of LoRAs for each number
    each: int = 4               # pictures with each set
    steps: int = 20             # Euler steps
    seed: int = 1               # of sets, captions and noise
    out: Path = Path("runs/autolora-evaluate")  # folder for the figures and for a sheet of pictures
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def __post_init__(self):
        if not set(self.numbers) <= {1, 2, 3, 4, 5} or not set(self.rules) <= set(RULES):
            raise UserError(f"--numbers {self.numbers}, --rules {self.rules}: expected numbers from 1 to 5, and rules of "
                            f"{', '.join(RULES)}")

    def run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        self.out.mkdir(parents=True, exist_ok=True)
        for part in ("retrieval", "fusion", "cost"):
            if self.part in ("all", part):
                getattr(self, part)()

    # --- retrieval ---

    @torch.no_grad()
    def retrieval(self) -> None:
        searcher, members = Searcher(self.encoder), lora_search.pool(self.pool)
        searcher.read("a circle")  # opens the text encoder
        entries = [entry_of(member.about) for member in members]
        vectors = F.normalize(torch.stack([searcher.embed(member.file)[0] for member in members]), dim=1)
        seen = [i for i, one in enumerate(members) if not one.held_out and not kept_apart(one)]
        unseen = [i for i, one in enumerate(members) if one.held_out]

        def ask(some: Sequence[int], captions: Callable[[int], list[str]]) -> tuple[list[str], Tensor]:
            said = [(i, caption) for i in some for caption in captions(i)]
            right = torch.tensor([i for i, _ in said])[:, None] == torch.arange(len(members))
            return [caption for _, caption in said], right
        kinds = {"its own captions": lambda i: list(members[i].captions.values()),
                 "new descriptions of learned forms": lambda i: entries[i].described(3, "evaluate"),
                 "of other forms": lambda i: entries[i].unseen,
                 "captions of pictures": lambda i: entries[i].prompts(4, "evaluate")}
        rows = {}
        for who, some in (("seen in training", seen), ("held out", unseen)):
            for kind, captions in kinds.items():
                if who == "held out" or kind != "its own captions":  # those were learned
                    words, right = ask(some, captions)
                    text = F.normalize(searcher.head(searcher.words(words).clone()), dim=1)
                    rows[f"LoRAs {who}, {kind}"] = scores(text @ vectors.T, right)
        words, right = ask(unseen, kinds["its own captions"])
        for name, likeness in self.by_weights(members).items():
            rows[f"LoRAs held out, its own captions, by {name}"] = scores(
                second_hand(searcher, members, seen, words, likeness), right)
        n = len(members)
        rows["chance"] = {"recall@1": 1 / n, "recall@5": 5 / n, "recall@10": 10 / n,
                          "mrr": sum(1 / k for k in range(1, n + 1)) / n, "ndcg@10": float("nan"), "mean rank": (n + 1) / 2}
        gap, intra, inter = coherence(vectors, entries)
        print(f"| among {n} LoRAs | recall@1 | recall@5 | recall@10 | MRR | nDCG@10 | mean rank |\n{'|---' * 7}|")
        for name, row in rows.items():
            print(f"| {name} | {row['recall@1']:.2f} | {row['recall@5']:.2f} | {row['recall@10']:.2f} | {row['mrr']:.2f} | "
                  f"{row['ndcg@10']:.2f} | {row['mean rank']:.1f} |")
        print(f"theme coherence, of LoRAs of one style or one shape: {intra:.3f} within, {inter:.3f} between, gap {gap:.3f}")
        write(self.out / "retrieval.json", {"rows": rows, "intra": intra, "inter": inter, "gap": gap})

    def by_weights(self, members: list[Member]) -> dict[str, Tensor]:
        """Likenesses (n, n) that no training made: of norms layer by layer, and of the changes themselves."""
        names = lora_names.names(DEMO)
        adapters = [io.read(member.file, names)[0]["flux"] for member in members]
        layers = sorted({layer for adapter in adapters for layer in adapter.layers})
        norms = torch.tensor([[algebra.norm(adapter, layer) for layer in layers] for adapter in adapters])
        factors = [changed(adapter, layers) for adapter in adapters]
        inner = torch.tensor([[sum(float(((Ba.T @ Bb) * (Aa @ Ab.T)).sum()) for (Aa, Ba), (Ab, Bb) in zip(a, b, strict=True))
                               for b in factors] for a in factors])
        size = inner.diagonal().sqrt()
        return {"norms of layers": -torch.cdist(norms.log(), norms.log()), "cosine of changes": inner / size / size[:, None]}

    # --- fusion ---

    def fusion(self) -> None:
        studio, mark = Studio(self.steps, learned=self.gates), checkpoint.fingerprint(self.gates)
        kept = self.kept()
        for number in self.numbers or (1, 2, 3, 4, 5):
            if number == 1:
                self.alone(studio)
                continue
            some = cases(self.pool, self.count, self.each, number - 2, self.seed)
            rules = [rule for rule in self.rules or RULES if number == 2 or rule not in fusion_trial.PAIRS_ONLY]
            if number == 2:
                rules += ["object alone", "style alone"]
                rules += [f"gates without {term}" for term in fusion_trial.TERMS] if self.ablate else []
            results = {}
            for rule in tqdm(rules, desc=f"{number} LoRAs", disable=None):
                name = f"{rule}, {number} LoRAs" + (f", gates {mark}" if rule.startswith(("gates", "static")) else "")
                if name not in kept:
                    kept[name] = trial(studio, some, rule).tolist()
                    write(self.out / "fusion.json", {"settings": self.settings, "rows": kept})
                results[rule] = np.array(kept[name])
            print(*table(f"{number} LoRAs, {self.count * self.each} pictures", results), sep="\n", flush=True)
            self.show(studio, some[:8], number)
        print(f"figures and sheets are in {self.out}; gates {mark}")

    @property
    def settings(self) -> dict:
        """What all rows of the figures have in common."""
        return {"count": self.count, "each": self.each, "steps": self.steps, "seed": self.seed, "pool": str(self.pool)}

    def kept(self) -> dict[str, list]:
        """Rows of an earlier run with the same settings."""
        try:
            found = json.loads((self.out / "fusion.json").read_text())
        except (OSError, ValueError):
            return {}
        return found["rows"] if found.get("settings") == self.settings else {}

    def show(self, studio: Studio, some: Sequence[Case], number: int) -> None:
        """A picture of each set in a row: either LoRA alone, the sum, and the gates."""
        ways = ["object alone", "style alone", "sum", "gates"]
        pils = [studio.pictures(replace(case, captions=case.captions[:1]), way)[0] for case in some for way in ways]
        captions = [f"{way}: {case.captions[0].text}" for case in some for way in ways]
        pictures.write_png(self.out / f"fusion_{number}.png", pictures.contact_sheet(pils, len(ways), captions), None)

    def alone(self, studio: Studio) -> None:
        """With one LoRA every picture must be the same under gates as without."""
        some = cases(self.pool, 2, self.each, 0, self.seed)
        same = [np.array_equal(np.asarray(a), np.asarray(b)) for case in some
                for a, b in zip(*(studio.draw(fusion_trial.only(case, 0), rule) for rule in ("gates", "sum")), strict=True)]
        print(f"1 LoRA: {sum(same)} of {len(same)} pictures are the same under gates, bit for bit")


    # --- cost ---

    @torch.inference_mode()
    def cost(self) -> None:
        """Processor time of a step under gates, beside the same LoRAs plainly added, and merged into the weights."""
        studio, rounds = Studio(2, learned=self.gates), 5
        print("| LoRAs, 4 pictures | merged | added | gates | gates by the definition | the last three over merged |",
              "|---" * 6 + "|", sep="\n")
        for number in (1, 2, 3, 5):
            case = cases(self.pool, 1, 4, max(0, number - 2), self.seed)[0]
            case = fusion_trial.only(case, 0) if number == 1 else case
            spent = {way: [] for way in ("merged", "added", "gates", "definition")}
            for _ in range(rounds):
                for way, times in spent.items():
                    times.append(studio.seconds(case, way))
            found = {way: float(np.median(times)) for way, times in spent.items()}
            ratios = " / ".join(f"{found[way] / found['merged']:.2f}" for way in ("added", "gates", "definition"))
            print(f"| {number} | " + " | ".join(f"{1e3 * x:.0f} ms" for x in found.values()) + f" | {ratios} |", flush=True)


def scores(similarity: Tensor, right: Tensor) -> dict[str, float]:
    places = contrast.ranks(similarity, right).float()
    return {f"recall@{k}": contrast.recall(similarity, right, k) for k in (1, 5, 10)} | {
        "mrr": (1 / places).mean().item(), "ndcg@10": contrast.ndcg(similarity, right), "mean rank": places.mean().item()}


def second_hand(searcher: Searcher, members: list[Member], seen: list[int], words: list[str], likeness: Tensor) -> Tensor:
    """What weights alone can answer: the LoRA seen in training whose caption is nearest in words, and what is like it."""
    known = [(i, caption) for i in seen for caption in members[i].captions.values()]
    have = searcher.words([caption for _, caption in known]).clone()
    asked, mean, size = searcher.words(words).clone(), have.mean(0), have.std(0) + 1e-6
    a, b = (F.normalize((each - mean) / size, dim=1) for each in (asked, have))
    nearest = (a @ b.T).argmax(1).tolist()
    return torch.stack([likeness[known[k][0]] for k in nearest])


def changed(adapter: Adapter, layers: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """A (R, in) and scaled B (out, R) of every layer."""
    return [algebra.joined(list(adapter.layers[layer]), 0) for layer in layers]


def coherence(vectors: Tensor, entries: Sequence[Entry]) -> tuple[float, float, float]:
    """Mean cosine of LoRAs of one theme minus that of different ones: their one style, or their one shape."""
    some = [i for i, entry in enumerate(entries) if not (entry.style and entry.shape)]
    themes = [entries[i].style or entries[i].shape for i in some]
    cosines = vectors[some] @ vectors[some].T
    same = torch.tensor([[a == b for b in themes] for a in themes])
    other = ~torch.eye(len(some), dtype=torch.bool)
    intra, inter = cosines[same & other].mean().item(), cosines[~same].mean().item()
    return intra - inter, intra, inter


def write(path: Path, figures: dict) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(figures, indent=1) + "\n")
    draft.replace(path)
