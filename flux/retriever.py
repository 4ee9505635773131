"""Training the retriever of AutoLoRA (arXiv 2508.02107, section 2 of our notes) on a pool of LoRAs with captions.

LoRAs marked `held_out` are never trained on; an eighth of the others is kept for validation, on which the least similarity
and the probabilities are calibrated. Splits are by LoRA. What is measured at the end is on the held-out ones.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import draws, lora_layers, lora_names, weights
from flux.config import preset
from flux.demo.pool import Entry, entry_of
from flux.errors import UserError
from flux.lora_search import Member, Words, pool
from flux.settings import Training
from lora import contrast, encoder, io, retrieval
from lora.contrast import ReferenceRetriever, Retriever
from lora.encoder import Encoder, Reference, Sizes
from lora.index import Calibration
from lora.probes import augmented, changes

DEMO_SIZES = Sizes(width=128, depth=2, heads=4, head_dim=32, hidden=256, probes=4, narrow=32, out=96)


@dataclass(frozen=True)
class TrainRetriever(Training):
    """The encoder that finds LoRAs by their weights, on a pool of LoRAs with captions."""

    pool: Path = weights.DEMO / "pool"  # folder of LoRAs with index.json, as train.py demo pool writes; default: that one
    model: str = "demo"         # the preset that the LoRAs are for
    weights: Path | None = None  # folder with the model's weights, for CLIP
    warm: Path | None = None    # encoder to begin with and leave as it is: only the head on the captions is learned
    kind: Literal["ours", "reference"] = "ours"  # of encoder and loss: ours, or as published (LoRAs of all layers only)
    steps: int = 900
    lr: float = 1.5e-3
    batch: int = 32             # LoRAs per step, each once
    text: Literal["auto", "pooled", "tokens"] = "auto"  # CLIP's pooled row, or the mean of its tokens; auto: demo's tokens
    captions: int = 4           # of each LoRA in a step
    prompts: int = 32           # captions of pictures of its kind that are learned beside its own, where the demo knows it
    precision: float = 0.95     # share of right answers from which on a search gives them, 0 to 1
    weight_decay: float = 0.1
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 50
    ema: float = 0.98
    sample_every: int = 0
    validate_every: int = 100

    def task(self):
        return RetrieverTask(self)


class RetrieverTask:
    def __init__(self, settings: TrainRetriever):
        self.settings, self.preset = settings, preset(settings.model)
        self.layers, names = lora_layers.layers(self.preset.flux), lora_names.names(self.preset)
        self.way = settings.text if settings.text != "auto" else "tokens" if settings.model == "demo" else "pooled"
        if settings.kind == "reference" and self.way == "tokens":
            self.way = "pooled"
        self.members = pool(settings.pool)
        self.demo = all(entry_of(one.about) for one in self.members)  # for whose LoRAs the demo can write captions
        self.train = [i for i, one in enumerate(self.members) if not one.held_out and not kept_apart(one)]
        self.validation = [i for i, one in enumerate(self.members) if not one.held_out and kept_apart(one)]
        self.test = [i for i, one in enumerate(self.members) if one.held_out]
        if min(map(len, (self.train, self.validation, self.test))) < 2:
            raise UserError(f"{settings.pool} has {len(self.train)} LoRAs to train on, {len(self.validation)} to validate "
                            f"and {len(self.test)} held out; expected at least 2 of each; add LoRAs")
        self.loras = [changes(io.read(one.file, names)[0]["flux"], self.layers) for one in self.members]
        self.words = words = Words(self.preset, settings.weights, self.way)
        self.text = [words(list(one.captions.values())) for one in self.members]  # each (captions, width)
        plain = Entry("", "", "").prompts(16 * settings.prompts, "plain") if self.demo else []  # that ask for no LoRA
        self.plain = words(plain)
        self.more = [words(more_captions(one, settings.prompts)) for one in self.members]
        torch.manual_seed(draws.seed_of(settings.seed, "retriever"))
        width = self.preset.clip.hidden_size
        small = self.preset.name == "demo"
        if settings.kind == "ours":
            self.model = Retriever(Encoder(self.layers, DEMO_SIZES if small else Sizes(out=width)), width)
            if settings.warm:
                self.model.encoder = encoder.load(settings.warm, self.layers)[0].requires_grad_(False)
                with torch.no_grad():
                    self.vectors = self.model.encoder(self.loras)
            self.model.standardise(torch.cat([torch.cat((self.text[i], self.more[i])) for i in self.train]))
        else:
            self.model = ReferenceRetriever(Reference(self.layers, replace(
                encoder.REFERENCE, width=width, **({"heads": 3, "head_dim": 32, "hidden": 4 * width} if small else {}))))

    def trainable(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro: int):
        """Distinct LoRAs, as many of each kind as can be, as they may be given (`augmented`), and captions of each."""
        seed = (self.settings.seed, "retriever", step, micro)
        rng, g = draws.rng(*seed), draws.generator(*seed)
        kinds = [self.members[i].about.get("kind", "") for i in self.train]
        share = torch.tensor([1 / kinds.count(kind) for kind in kinds]).double().numpy()
        some = rng.choice(self.train, min(self.settings.batch, len(self.train)), replace=False, p=share / share.sum())
        ours = self.settings.kind == "ours"
        loras = some if self.settings.warm else [augmented(self.loras[i], g) if ours else self.loras[i] for i in some]
        each = self.settings.captions if ours else 1
        known = [torch.cat((self.text[i], self.more[i])) for i in some]
        text = torch.cat([own[torch.randint(len(own), (each,), generator=g)] for own in known])
        owner = torch.arange(len(some)).repeat_interleave(each)
        if ours and len(self.plain):
            few = torch.randint(len(self.plain), (len(some),), generator=g)
            text, owner = torch.cat((text, self.plain[few])), torch.cat((owner, torch.full((len(few),), -1)))
        return loras, text, owner, g if ours else None

    def loss(self, batch) -> Tensor:
        if not self.settings.warm:
            return self.model.loss(*batch)
        some, text, owner, _ = batch
        return contrast.soft_loss(self.vectors[some], self.model.head(text), owner, self.model.scale)

    def held_out(self) -> list:
        """Validation LoRAs with their first captions."""
        some = self.validation
        loras = some if self.settings.warm else [self.loras[i] for i in some]
        return [(loras, torch.cat([self.text[i][:1] for i in some]), torch.arange(len(some)), None)]

    def preview(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        """The encoder, calibrated on the validation LoRAs among those that it was trained on; and its figures, printed."""
        found = self.calibrated()
        head = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith("encoder.")}
        about = {"model": self.preset.name, "text": self.way, "calibration": found and vars(found),
                 "config": str(self.settings)}
        encoder.save(folder / "final.safetensors", self.model.encoder, head, about)
        figures = {**self.figures("held out, among them", self.test, self.test),
                   **self.figures("held out, among all", list(range(len(self.members))), self.test)}
        draft = folder / ".figures.json"
        draft.write_text(json.dumps(figures, indent=1) + "\n")
        draft.replace(folder / "figures.json")
        print("| captions of LoRAs | LoRAs | recall@1 | recall@5 | recall@10 | MRR | nDCG@10 | mean rank | chance @1, @5 |\n"
              + "|---" * 9 + "|")
        for name, row in figures.items():
            print(f"| {name} | {row['loras']} | {row['recall@1']:.2f} | {row['recall@5']:.2f} | {row['recall@10']:.2f} | "
                  f"{row['mrr']:.2f} | {row['ndcg@10']:.2f} | {row['mean rank']:.1f} | {1 / row['loras']:.2f}, "
                  f"{min(1.0, 5 / row['loras']):.2f} |")
        print(f"search with it: python -m flux.lora_search index {self.settings.pool} "
              f"--encoder {folder / 'final.safetensors'}")

    def calibrated(self) -> Calibration | None:
        """What first answers to captions of validation LoRAs are worth; None, and a word, where that cannot be told."""
        among, ours = self.train + self.validation, self.settings.kind == "ours" and self.settings.prompts > 0
        more = ours and self.demo  # then there are captions that were not learned of LoRAs that were
        similarity, right = self.answers(among, among if more else self.validation, more)
        best, first = similarity.max(dim=1)
        sure = right.gather(1, first[:, None])[:, 0]
        print(f"validation: {int(sure.sum())} of {len(sure)} captions first find one that fits, among {similarity.shape[1]}")
        try:
            found = retrieval.calibrate(best, sure, self.settings.precision)
        except UserError as error:
            print(f"not calibrated, searches take what is nearest: {error}")
            return None
        print(f"calibrated: {int((best >= found.min_sim).sum())} have a similarity of {found.min_sim:.3f} or more, where "
              f"{self.settings.precision:.0%} are right")
        return found

    @torch.no_grad()
    def answers(self, among: list[int], asked: list[int], more: bool = False) -> tuple[Tensor, Tensor]:
        """Similarities (t, n) of all captions of LoRAs `asked` to LoRAs `among`, and which are right.

        more: of captions that the demo can write and nobody learned, with as many that ask for no LoRA; then right is every
        LoRA that teaches nothing but what is asked for.
        """
        vectors = self.model.encoder([self.loras[i] for i in among])
        text = torch.cat([self.text[i] for i in asked])
        if more:
            return self.fitting(vectors, among, asked)
        text = self.model.head(text) if hasattr(self.model, "head") else text
        owner = torch.tensor([i for i in asked for _ in self.text[i]])
        return F.normalize(text, dim=1) @ F.normalize(vectors, dim=1).T, owner[:, None] == torch.tensor(among)

    def fitting(self, vectors: Tensor, among: list[int], asked: list[int]) -> tuple[Tensor, Tensor]:
        """`answers` with `more`."""
        entries = {i: entry_of(self.members[i].about) for i in {*among, *asked}}
        said = [(entries[i], caption) for i in asked
                for caption in (*entries[i].unseen, *entries[i].prompts(4, "validation"))]
        plain = Entry("", "", "")
        said += [(plain, caption) for caption in plain.prompts(len(said), "validation")]
        text = self.words([caption for _, caption in said]).clone()
        right = torch.tensor([[has.style in ("", entry.style) and has.shape in ("", entry.shape)
                               for has in (entries[i] for i in among)] for entry, _ in said])
        return F.normalize(self.model.head(text), dim=1) @ F.normalize(vectors, dim=1).T, right

    def figures(self, name: str, among: list[int], asked: list[int]) -> dict[str, dict]:
        similarity, right = self.answers(among, asked)
        places = contrast.ranks(similarity, right).float()
        out = {f"recall@{k}": contrast.recall(similarity, right, k) for k in (1, 5, 10)}
        return {name: out | {"loras": len(among), "mrr": (1 / places).mean().item(), "mean rank": places.mean().item(),
                             "ndcg@10": contrast.ndcg(similarity, right)}}


def more_captions(member: Member, count: int) -> list[str]:
    """Of a LoRA of the demo's pool: its description in other words, and captions of pictures of its kind."""
    entry = entry_of(member.about)
    return [] if entry is None or not count else [*entry.described(2 * count, "seen"), *entry.prompts(count, "seen")]


def kept_apart(member: Member) -> bool:
    """An eighth, chosen by name, for validation."""
    return draws.seed_of("validation", member.name) % 8 == 0
