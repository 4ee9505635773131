"""Find LoRAs of FLUX.1 by what they do: `python -m flux.lora_search index POOL` and `... find "a prompt"`.

A trained encoder (`python train.py autolora retriever`) brings the weights of a LoRA and the words of a prompt into one
space; `lora/index.py` keeps a folder's vectors and `lora/retrieval.py` searches them. Here they meet FLUX.1's names, its
CLIP, and what lies beside a pool's files.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flux import checkpoint, cli, lora_layers, lora_names, weights
from flux.conditioning import CLIP_LENGTH
from flux.config import PRESETS, Preset, preset
from flux.errors import UserError
from flux.tokenizers import ClipTokenizer
from lora import encoder, index, io, retrieval
from lora.adapter import Adapter, LowRank
from lora.probes import Changes, changes


class Words:
    """Captions -> (n, 768): CLIP's pooled row, of a long caption the mean over its pieces; or, as `tokens`, the mean of its
    tokens' embeddings, whose order and neighbours do not count: right for words that CLIP was never trained on."""

    def __init__(self, model: Preset, folder: Path | None = None, way: str = "pooled"):
        assert way in ("pooled", "tokens"), way
        self.way = way
        found = weights.find(model, folder)
        weights.require(found, "clip", "tokenizer")
        self.tokenizer = ClipTokenizer(found["tokenizer"].path)
        self.clip, self.width = weights.load_clip(found, model.clip, torch.float32).eval(), model.clip.hidden_size

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> Tensor:
        if not captions:
            return torch.zeros(0, self.width)
        return torch.stack([self.bag(caption) if self.way == "tokens" else
                            self.clip(self.tokenizer(self.pieces(caption), CLIP_LENGTH))[1].mean(dim=0)
                            for caption in captions])

    def bag(self, caption: str) -> Tensor:
        ids = self.tokenizer(self.pieces(caption), CLIP_LENGTH)
        said = torch.cat([row[1:int((row == row.max()).nonzero()[0])] for row in ids])  # up to the end, its highest id
        return self.clip.text_model.embeddings.token_embedding.weight[said].sum(dim=0) / max(1, len(said))

    def pieces(self, caption: str) -> list[str]:
        """A caption, what CLIP would cut off it, what it would cut off that, and so on."""
        out = [caption]
        while rest := self.tokenizer.dropped(out[-1], CLIP_LENGTH)[1]:
            out.append(rest)
        return out


class Searcher:
    """An encoder's file, opened: LoRA files and prompts to vectors that can be compared."""

    def __init__(self, path: Path, folder: Path | None = None):
        """folder: of the model's weights, for CLIP. DoRAs are taken without their base (`probes.py`)."""
        head = checkpoint.read_header(checkpoint.locate(path)).metadata.get("lora_encoder", "")
        try:
            name, self.way = json.loads(head)["model"], json.loads(head).get("text", "pooled")
            assert name in PRESETS and self.way in ("pooled", "tokens")
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise checkpoint.refuse(path, "is no encoder of LoRAs", "one that train.py autolora retriever wrote",
                                    "name that one") from error
        self.preset, self.folder = preset(name), folder
        self.layers, self.names = lora_layers.layers(self.preset.flux), lora_names.names(self.preset)
        self.encoder, more, about = encoder.load(path, self.layers)
        self.head = None
        if "head.weight" in more:
            self.head = nn.Linear(*reversed(more["head.weight"].shape))
            self.head.load_state_dict({"weight": more["head.weight"], "bias": more["head.bias"]})
        self.calibration = index.Calibration(**about["calibration"]) if about.get("calibration") else None
        self.fingerprint = checkpoint.fingerprint(checkpoint.locate(path))
        self.words: Words | None = None

    @torch.inference_mode()
    def embed(self, file: Path) -> tuple[Tensor, dict]:
        """A LoRA's file -> (d,), and what its line in an index says."""
        adapters, report = io.read(file, self.names)
        lora = changes(adapters.get("flux", Adapter()), self.layers)
        if not lora:
            raise checkpoint.refuse(file, "changes none of the encoder's layers", "a LoRA on its blocks", "leave it out")
        return self.encoder([lora])[0], {"layers": len(lora), "ranks": rank_summary(lora), "norm": round(norm(lora), 4),
                                         "title": report.metadata.get("modelspec.title", "")[:200]}

    @torch.inference_mode()
    def read(self, prompt: str) -> Tensor:
        """A prompt -> (d,)."""
        self.words = self.words or Words(self.preset, self.folder, self.way)
        text = self.words([prompt])
        return (text if self.head is None else self.head(text))[0]


def rank_summary(lora: Changes) -> dict[str, int]:
    """How many layers have which rank; those of no pair of factors count as `other`."""
    return dict(Counter("other" if change.pair is None else str(change.pair.rank) for change in lora.values()))


def norm(lora: Changes) -> float:
    """Frobenius norm over all layers' pairs of factors: |BA|^2 = tr((B^T B)(A A^T))."""
    total = 0.0
    for change in lora.values():
        if isinstance(change.pair, LowRank):
            A, B = change.pair.A.float(), change.pair.scale * change.pair.B.float()
            total += ((B.T @ B) * (A @ A.T)).sum().item()
    return max(total, 0.0) ** 0.5


@dataclass(frozen=True)
class Member:
    """A LoRA of a pool and what is said of it."""

    name: str  # without .safetensors
    file: Path
    captions: dict[str, str]  # by length: long, medium, short
    held_out: bool
    about: dict


def pool(folder: Path) -> list[Member]:
    """The LoRAs that a pool's index.json describes, as `python train.py demo pool` writes it."""
    table = folder / "index.json"
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))
        members = [Member(name, folder / f"{name}.safetensors", dict(row["captions"]), bool(row["held_out"]), row)
                   for name, row in sorted(rows.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.shown(table)} is no table of a pool; expected names with captions and held_out; "
                        "make one, as python train.py demo pool does") from error
    return [member for member in members if member.file.is_file()]


def labels(folder: Path) -> Mapping[str, dict]:
    """By file name, what a pool's index.json adds to the lines of an index; nothing where there is none."""
    if not (folder / "index.json").is_file():
        return {}
    return {member.file.name: {key: member.about[key] for key in ("kind", "captions") if key in member.about}
            for member in pool(folder)}


def build(flags: argparse.Namespace) -> None:
    searcher = Searcher(flags.encoder, flags.weights)
    path = flags.index or flags.pool / "index.safetensors"
    with tqdm(desc="LoRAs", disable=None) as bar:
        def embed(file: Path) -> tuple[Tensor, dict]:
            bar.update()
            return searcher.embed(file)
        found, report = index.build(path, flags.pool, embed, searcher.fingerprint, labels(flags.pool), searcher.calibration,
                                    flags.fresh)
    print(f"{path}: {len(found)} LoRAs; {len(report.added)} new, {len(report.kept)} as before, {len(report.removed)} gone, "
          f"{len(report.duplicates)} copies, {len(report.refused)} refused")
    for name, why in report.refused.items():
        print(f"  refused: {checkpoint.shown(name)}: {why}")


def find(flags: argparse.Namespace) -> None:
    searcher = Searcher(flags.encoder, flags.weights)
    found = index.Index(flags.index, searcher.fingerprint)
    vector, among = searcher.read(flags.prompt), (flags.kind, flags.exclude, flags.diversity)
    answer = retrieval.query(found, vector, flags.k, flags.min_sim, *among)
    for hit in answer.hits:
        sure = "" if hit.probability is None else f"  {hit.probability:4.0%} sure"
        print(f"{hit.similarity:6.3f}{sure}  {hit.file}")
    if not answer.hits:
        nearest = retrieval.query(found, vector, 1, -1, *among).hits
        also = [f"; the nearest, {hit.file}, has {hit.similarity:.3f}: --min-sim takes less" for hit in nearest]
        print("no LoRA is near enough" + "".join(also))
    for name in answer.gone:
        print(f"  its file is gone: {checkpoint.shown(name)}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.lora_search", description="Find LoRAs by what they do.")
    commands = parser.add_subparsers(dest="command", required=True)
    indexing = commands.add_parser("index", help="index a folder of LoRAs, or bring its index up to date")
    indexing.add_argument("pool", type=Path)
    indexing.add_argument("--index", type=Path, help="file to write (default: index.safetensors in the folder)")
    indexing.add_argument("--fresh", action="store_true", help="embed all files anew, as for another encoder")
    indexing.set_defaults(run=build)
    finding = commands.add_parser("find", help="the LoRAs that fit a prompt")
    finding.add_argument("prompt")
    finding.add_argument("--index", type=Path, required=True)
    finding.add_argument("-k", type=int, default=3, help="at most so many (3)")
    finding.add_argument("--min-sim", type=float, help="least similarity, -1 to 1 (default: the calibrated one, if any)")
    finding.add_argument("--kind", action="append", default=[], help="only of this kind; repeatable")
    finding.add_argument("--exclude", action="append", default=[], help="id or sha256 of one to leave out; repeatable")
    finding.add_argument("--diversity", type=float, default=0.3, help="against near copies, 0 to 1 (0.3)")
    finding.set_defaults(run=find)
    for sub in (indexing, finding):
        sub.add_argument("--encoder", type=Path, required=True, help="file that train.py autolora retriever wrote")
        sub.add_argument("--weights", type=Path, help="folder of the model's weights, for CLIP")
    flags = parser.parse_args(argv)
    flags.run(flags)


if __name__ == "__main__":
    cli.run(main)
