"""AutoLoRA: LoRAs found by their weights for a prompt, and several applied at once (arXiv 2508.02107).

A prompt asks an index of a folder (`flux/lora_search.py`) for the LoRAs whose weights fit it; these are put on the network
under learned gates (`lora/gates.py`), and the picture is drawn as by t2i. Training: the retriever in `flux/retriever.py`,
the gates in `flux/demo/fusion_stage.py`; both are measured by `flux/demo/autolora_trial.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image

from flux import checkpoint, cli, lora_search, pictures, weights
from flux.demo.autolora_trial import Evaluate
from flux.demo.fusion_stage import TrainFusion
from flux.errors import UserError
from flux.fusion import ENCODER, heat_map
from flux.lora_search import Searcher
from flux.retriever import TrainRetriever
from flux.settings import Sampling
from lora import index as indices
from lora import retrieval
from lora.index import Index
from lora.retrieval import Hit


@dataclass(frozen=True)
class AutoLora(Sampling):
    """The LoRAs of a folder that fit a prompt, by their weights, and a picture with them."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures, each with LoRAs of its own
    pool: Path = weights.DEMO / "pool"  # folder of LoRAs; its index is kept in it, and brought up to date
    index: Path | None = None  # file of the index, where the folder cannot be written to
    encoder: Path = weights.DEMO / ENCODER  # file that train.py autolora retriever wrote
    max_loras: int = 3  # at most so many are taken
    min_sim: float | None = None  # least similarity, -1 to 1; default: the encoder's calibrated one
    diversity: float = 0.3  # against near copies, 0 to 1
    kind: tuple[str, ...] = ()  # take only of this kind, such as style; may be repeated
    exclude: tuple[str, ...] = ()  # id or sha256 of a LoRA to leave out; may be repeated
    always: tuple[str, ...] = ()  # PATH or PATH:SCALE of a LoRA to take in any case; may be repeated
    budget_mb: float | None = None  # MB that the files of all found ones may have; what does not fit is passed over
    lora_scale: float = 1.0  # strength of those that are found
    fuse: str = "gates"  # how several are weighed, as in t2i
    dry_run: bool = False  # say which LoRAs would be taken, and draw nothing
    batch: int = 4  # pictures that go through the transformer together
    POSITIONAL = "prompt"

    def __post_init__(self):
        super().__post_init__()
        if self.max_loras < 0 or (self.budget_mb is not None and self.budget_mb < 0):
            raise UserError(f"--max-loras {self.max_loras}, --budget-mb {self.budget_mb}: expected 0 or more; change them")

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        """(picture, metadata); beside each picture under gates, once it is saved, a map of these."""
        if not self.prompt:
            raise UserError('no prompt came, expected words to find LoRAs by: python sample.py autolora "a red gear"')
        searcher = Searcher(self.encoder, self.weights)
        found = self.indexed(searcher)
        text_to_image = cli.recipes()["t2i"]
        for i, prompt in enumerate(self.prompt):
            hits = self.choose(found, searcher, prompt) if found else ()
            words = *self.lora, *self.always, *(f"{hit.file}:{self.lora_scale:g}" for hit in hits)
            if self.dry_run:
                continue
            gated = self.fuse.partition(":")[0] == "gates"
            values = {field.name: getattr(self, field.name) for field in fields(Sampling)}
            values |= {"prompt": (prompt,), "lora": words, "seed": self.seed + i * self.num, "batch": self.batch,
                       "fuse": self.fuse, "gate_report": gated}
            for pil, metadata in cli.build(text_to_image, cli.describe(text_to_image).sample, values).images():
                names = {f"{k} {Path(cli.path_and_scale('--lora', word, -10, 10)[0]).name}": word
                         for k, word in enumerate(words, 1)}
                said = {"loras": [{"id": hit.id, "similarity": round(hit.similarity, 4), "strength": self.lora_scale,
                                   "sure": hit.probability and round(hit.probability, 4)} for hit in hits]}
                alone = replace(self, prompt=(prompt,), num=1, seed=metadata["seed"])
                before = set(self.out.glob("*.png"))
                yield pil, metadata | said | {"config": alone}
                shown = metadata.get("gates", {})
                if [name for name in names if name in shown]:
                    for path in set(self.out.glob(f"*_seed{metadata['seed']}.png")) - before:
                        place = path.with_name(f"{path.stem}_gates.png")
                        pictures.write_png(place, heat_map(shown), None)
                        print(f"{place}: " + ", ".join(f"{name} {mean(shown[name]):.2f}" for name in names if name in shown))

    def indexed(self, searcher: Searcher) -> Index | None:
        """The pool's index, up to date; None, and a line, where there is nothing in it."""
        path = self.index or self.pool / "index.safetensors"
        files = [file for file in self.pool.rglob("*.safetensors") if file.absolute() != path.absolute()]
        if self.pool.is_dir() and not files:
            print(f"{checkpoint.shown(self.pool)} has no LoRAs: drawing without")
            return None
        stale = path.exists() and Index(path).encoder != searcher.fingerprint
        found, report = indices.build(path, self.pool, searcher.embed, searcher.fingerprint, lora_search.labels(self.pool),
                                    searcher.calibration, fresh=stale)
        if report.added or report.removed or report.refused:
            print(f"{path}: {len(found)} LoRAs; {len(report.added)} new, {len(report.removed)} gone, "
                  f"{len(report.duplicates)} copies, {len(report.refused)} refused")
        for name, why in report.refused.items():
            print(f"  refused: {checkpoint.shown(name)}: {why}")
        return found

    def choose(self, found: Index, searcher: Searcher, prompt: str) -> tuple[Hit, ...]:
        """Those that fit and that there is room for, said in a line each."""
        if not self.max_loras:
            return ()
        vector = searcher.read(prompt)
        answer = retrieval.query(found, vector, self.max_loras if self.budget_mb is None else len(found), self.min_sim,
                                 self.kind, self.exclude, self.diversity)
        hits, left = [], self.budget_mb
        for hit in answer.hits:
            size = hit.file.stat().st_size / 1e6
            if len(hits) < self.max_loras and (left is None or size <= left):
                hits.append(hit)
                left = None if left is None else left - size
        for hit in hits:
            sure = "" if hit.probability is None else f", {hit.probability:4.0%} sure"
            print(f"{prompt}: {hit.id}, similarity {hit.similarity:.3f}{sure}, strength {self.lora_scale:g}")
        if not hits:
            near = retrieval.query(found, vector, 1, -1, self.kind, self.exclude, self.diversity).hits
            also = [f"; the nearest, {hit.id}, has {hit.similarity:.3f}: --min-sim takes less" for hit in near]
            print(f"{prompt}: no LoRA is near enough, or none fits --budget-mb: drawing without" + "".join(also))
        return tuple(hits)


def mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / max(1, sum(map(len, rows)))


SAMPLE = AutoLora
TRAIN = {"retriever": TrainRetriever, "fusion": TrainFusion, "evaluate": Evaluate}
