"""What a person sees of a run: metrics.jsonl, the bar, loss.png, samples/, where the time goes; TensorBoard if asked for."""

import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux import pictures
from flux.errors import UserError


class Log:
    """A row per step, with the figures of all steps of the run so far, also those of before it was resumed."""

    def __init__(self, run: Path, settings, step: int, leads: bool):
        """`leads`: only the first of several processes shows and writes anything."""
        self.run, self.settings, self.leads = run, settings, leads
        self.metrics = run / "metrics.jsonl"
        rows = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        self.rows = [json.loads(row) for row in rows[:step]]
        self.spent = Counter()
        silent = not leads or (None if sys.stderr.isatty() else True)
        self.bar = tqdm(total=settings.steps, initial=step, desc=run.name, disable=silent)
        self.board = board(run, step) if leads and settings.tensorboard else None

    @contextmanager
    def time(self, what: str):
        """Seconds inside count as spent on `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - started

    def __call__(self, row: dict) -> None:
        self.rows.append(row)
        if not self.leads:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.update()
        if self.board:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["step"])
        if row["step"] % self.settings.log_every == 0:
            losses = [row["loss"] for row in self.rows[-100:]]
            smooth = f"{sum(losses) / len(losses):.4f}"
            self.bar.set_postfix(loss=smooth)
            if not sys.stderr.isatty():
                print(f"{self.run.name} step {row['step']}/{self.settings.steps} loss {smooth} {row['seconds']:.2f} s/step",
                      flush=True)

    def sample(self, picture: Image.Image | None, step: int) -> None:
        """samples/step_*.png, if the task gave one."""
        if self.leads and picture is not None:
            (self.run / "samples").mkdir(exist_ok=True)
            pictures.write_png(self.run / "samples" / f"step_{step:06d}.png", picture, None)

    def plot(self) -> None:
        """loss.png: each loss, their smoothed course, and the held-out set's where there is one."""
        if not self.leads:
            return
        losses = [row["loss"] for row in self.rows]
        window = max(1, min(100, len(losses) // 10))
        smooth, average = [], losses[0]
        for loss in losses:
            average += (loss - average) / window
            smooth.append(average)
        held_out = [(row["step"], row["validation"]) for row in self.rows if "validation" in row]
        pictures.write_png(self.run / "loss.png",
                           pictures.loss_plot([row["step"] for row in self.rows], losses, smooth, held_out), None)

    def close(self, finished: bool) -> None:
        """With the shares of the time since this start, once there is something to share."""
        self.bar.close()
        if self.board:
            self.board.close()
        if self.leads and finished and self.spent["all"]:
            rest = {"the loop itself": 2 * self.spent["all"] - sum(self.spent.values())}
            shares = ", ".join(f"{what} {seconds / self.spent['all']:.1%}" for what, seconds in (self.spent | rest).items()
                               if what != "all")
            print(f"{self.run.name}: time went to {shares}", flush=True)


def board(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; expected the extra: pip install -e \".[tensorboard]\", or leave "
                        "the flag out, metrics.jsonl and loss.png hold the same") from error
    return SummaryWriter(run / "tensorboard", purge_step=step + 1)
