"""What a training costs beside its mathematics, measured on the demo: `python -m flux.bench_training`, from the repository.

The loop's shares of a demo step, the seconds of a save, what the cache saves in an epoch, and what an editing LoRA's step
costs beside a plain one's. Nothing is written but into a temporary folder.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import train
from flux import bench
from flux.demo.edits import write as write_pairs
from flux.demo.folder import write
from flux.device import choose
from flux.edit_training import TrainEdit
from flux.lora_training import TrainLora
from flux.recipes import demo, t2i


def loop(steps: int, folder: Path) -> str:
    """The flow stage of the demo as it is, on fewer scenes; ten steps before the clock starts."""
    settings = demo.TrainFlow(steps=10, scenes=256, save_every=steps, sample_every=0, validate_every=0, out=folder)
    task = settings.task()
    task.save = lambda folder: None  # which would replace the shipped weights
    train.train(task, settings, folder / "run")
    spent = train.train(task, replace(settings, steps=10 + steps, save_every=max(1, steps // 5)), folder / "run")
    last = folder / "run" / "checkpoints" / f"step-{10 + steps:06d}"
    saves, size = 5, sum(file.stat().st_size for file in last.iterdir())
    total = spent["all"] - spent["saving"]
    maths = spent["forward and backward"] + spent["optimiser"]
    return "\n".join((
        f"| data | {spent['data'] / total:.1%} of a step |",
        f"| everything that is not data, forward, backward or optimiser | {(total - maths - spent['data']) / total:.1%} |",
        f"| of this, the moving average | {spent['moving average'] / total:.1%} |",
        f"| a checkpoint of {size / 1e6:.0f} MB | {spent['saving'] / saves:.2f} s |"))


def epochs(count: int, folder: Path) -> str:
    """Rendered pictures with captions as a data folder: batches made afresh, and read from the cache."""
    source = folder / "pictures"
    write(source, count)
    seconds, whole = {}, {}
    for cached in (False, True):
        task = t2i.FineTune(data=source, out=folder, batch=4, cache=cached, held_out=0.0).task()
        optimiser = train.optimisers.build(task.trainable(), task.settings)
        for seen, step in ((seconds, False), (whole, True)):
            rounds = []
            for epoch in range(3):
                started = time.perf_counter()
                for i in range(count // 4):
                    batch = task.batch(epoch * (count // 4) + i, 0)
                    if step:
                        task.loss(batch).mean().backward()
                        optimiser.step()
                        optimiser.zero_grad()
                rounds.append(time.perf_counter() - started)
            seen[cached] = np.median(rounds)
    return "\n".join(f"| {what} of {count} pictures, made afresh / from the cache | {s[False]:.2f} s / {s[True]:.2f} s = "
                     f"{s[False] / s[True]:.1f} |" for what, s in (("batches", seconds), ("batches and steps", whole)))


def edits(rounds: int, folder: Path) -> str:
    """Steps of an editing LoRA on Fill and of a plain LoRA with as many tokens, in turn, in seconds of the processor."""
    write(folder / "plain", 16)
    write_pairs(folder / "pairs", "recolour", 16)
    shared = {"out": folder, "batch": 8, "rank": 16, "held_out": 0.0}
    kinds = {"plain": TrainLora(data=folder / "plain", **shared), "editing": TrainEdit(data=folder / "pairs", **shared),
             "both": TrainEdit(data=folder / "pairs", train_embedder=True, **shared)}
    tasks = {kind: settings.task() for kind, settings in kinds.items()}
    optimisers = {kind: train.optimisers.build(task.trainable(), task.settings) for kind, task in tasks.items()}
    spent, data = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for step in range(rounds + 1):
        for kind, task in tasks.items():
            started = time.process_time()
            batch = task.batch(step, 0)
            data[kind].append(time.process_time() - started)
            task.loss(batch).mean().backward()
            optimisers[kind].step()
            optimisers[kind].zero_grad()
            spent[kind].append(time.process_time() - started)
    seconds, waits = ({kind: np.median(some[1:]) for kind, some in times.items()} for times in (spent, data))  # 1st: warm-up
    return "\n".join((
        f"| step of an editing LoRA / of a plain one, 8 pictures | {seconds['editing']:.2f} s / {seconds['plain']:.2f} s = "
        f"{seconds['editing'] / seconds['plain']:.2f} |",
        f"| the same with the first layer trained | {seconds['both'] / seconds['plain']:.2f} |",
        f"| data of an editing LoRA | {waits['editing'] / seconds['editing']:.1%} of a step |"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.bench_training", description="What a training costs beside its "
                                     "mathematics, on the demo.")
    parser.add_argument("--steps", type=int, default=100, help="steps of the flow stage (100)")
    parser.add_argument("--pictures", type=int, default=64, help="pictures of the data set, a multiple of 4 (64)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of a LoRA of each kind (10)")
    parser.add_argument("--edits", action="store_true", help="LoRAs alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [edits(options.rounds, Path(folder))]
        if not options.edits:
            rows = [loop(options.steps, Path(folder)), epochs(options.pictures, Path(folder)), *rows]
    print(f"\n| {bench.processor(choose('auto')[0])} | measured |\n|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
