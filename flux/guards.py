"""What stops a training before it spoils its weights: a number that is not finite, named by tensor, step and sample.

The loop asks after the loss, after the gradients, and before a checkpoint is written, so that no good one is ever replaced
by a spoiled one. What is only unusual is logged with its samples, and the run goes on.
"""

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from flux.errors import UserError
from flux.parallel import local


class Guard:
    """Of one run; `rows` are its metrics so far. A task may name its samples, `names(step, micro)`, or they are numbered."""

    def __init__(self, task, settings, parameters: dict[str, Tensor], run: Path, rows: list[dict] = ()):
        self.task, self.settings, self.parameters = task, settings, parameters
        self.remedy = (f"lower --lr (now {settings.lr}) or take out what is wrong in the data, and start again from the "
                       f"last checkpoint in {run}")
        self.recent = {name: deque((row[name] for row in rows), maxlen=100) for name in ("loss", "grad_norm")}

    def loss(self, step: int, micro: int, losses: Tensor) -> None:
        """losses (B,), one per sample, or () for the batch. Spoiled weights are named first: they are the cause."""
        finite = losses.isfinite()
        if finite.all():
            return
        weight = first_not_finite(self.parameters.items())
        if weight:
            raise UserError(f"step {step}: weight {weight}, and so the loss; expected finite numbers; {self.remedy}")
        names = self.names(step, micro)
        if losses.ndim:
            names = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        value = losses.detach()[~finite].flatten()[0].item()
        raise UserError(f"step {step}: the loss is {value} for {_some(names)}; expected a finite number; {self.remedy}")

    def gradients(self, step: int, norm: float) -> None:
        """`norm` over all gradients: it is finite if they all are, and not too large."""
        if not math.isfinite(norm):
            spoiled = first_not_finite((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)
            raise UserError(f"step {step}: the gradient of {spoiled or f'all weights has norm {norm}'}, from "
                            f"{_some(self.all_names(step))}; expected finite numbers; {self.remedy}")

    def state(self, step: int, average: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """All that a checkpoint holds, before it is written."""
        moments = ((f"{key} of {name}", value) for name, p in self.parameters.items()
                   for key, value in optimiser.state.get(p, {}).items())
        groups = ("weight", self.parameters.items()), ("average of", average.items()), ("optimiser's", moments)
        for kind, tensors in groups:
            spoiled = first_not_finite(tensors)
            if spoiled:
                raise UserError(f"step {step}: {kind} {spoiled}; expected finite numbers; nothing was saved; {self.remedy}")

    def unusual(self, row: dict) -> dict[str, list[str]]:
        """{"spike": [figure, sample, ...]} if a figure of this row is four times the median of the last hundred, else {}."""
        spikes = [name for name, recent in self.recent.items() if len(recent) >= 20 and row[name] > 4 * median(recent)]
        for name, recent in self.recent.items():
            recent.append(row[name])
        return {"spike": spikes + self.all_names(row["step"] - 1)} if spikes else {}

    def names(self, step: int, micro: int) -> list[str]:
        if hasattr(self.task, "names"):
            return self.task.names(step, micro)
        return [f"sample {i} of micro-step {micro}" for i in range(self.settings.batch)]

    def all_names(self, step: int) -> list[str]:
        return [name for micro in range(self.settings.accumulate) for name in self.names(step, micro)]


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """'NAME holds 3 of 128 numbers that are not finite', or ""; of a split tensor this process's part is asked."""
    for name, tensor in tensors:
        finite = local(tensor).isfinite()
        if not finite.all():
            return f"{name} holds {int((~finite).sum()):,} of {tensor.numel():,} numbers that are not finite"
    return ""


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
