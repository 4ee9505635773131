"""The demo world: every weight that ships, trained from nothing, stage by stage.

Autoencoder -> text/vision pair -> flow with T5 -> guidance distilled into the flow -> Fill, a LoRA on it; and a reader that
judges LoRAs. Later stages read what earlier ones wrote to the weights folder; `python train.py demo` runs them all. Each is
a file in `flux/demo/`.
"""

from dataclasses import dataclass
from pathlib import Path

from flux.demo.autoencoder_stage import TrainAutoencoder
from flux.demo.evaluate import Evaluate
from flux.demo.fill_stage import TrainFill
from flux.demo.fill_trial import JudgeFill
from flux.demo.flow_stage import TrainFlow, TrainGuidance
from flux.demo.lora_trial import JudgeLora, JudgePool, ShowLoras
from flux.demo.pair_stage import TrainPair
from flux.demo.pool import TrainPool
from flux.demo.reader_stage import TrainReader
from flux.demo.reuse_trial import JudgeReuse


@dataclass(frozen=True)
class TrainAll:
    """Every shipped weight from nothing, stage by stage, then the measured table; goes on where it was stopped."""

    seed: int = 0               # of every draw; the same seed gives the same weights on one machine
    out: Path = Path("runs")    # folder that gets one run folder per stage
    threads: int | None = None  # CPU threads; default: as many as PyTorch chooses

    def stages(self):
        yield from ((stage, TRAIN[stage](seed=self.seed, out=self.out, threads=self.threads))
                    for stage in ("autoencoder", "pair", "flow", "guidance", "fill", "reader"))
        yield "evaluate", Evaluate()


TRAIN = {"": TrainAll, "autoencoder": TrainAutoencoder, "pair": TrainPair, "flow": TrainFlow, "guidance": TrainGuidance,
         "fill": TrainFill, "reader": TrainReader, "evaluate": Evaluate, "judge-fill": JudgeFill, "judge-lora": JudgeLora,
         "show-loras": ShowLoras, "pool": TrainPool, "judge-pool": JudgePool, "judge-reuse": JudgeReuse}
