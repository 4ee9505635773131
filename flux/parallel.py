"""Several processes as one training: `torchrun --nproc-per-node 2 train.py ... --accumulate 2`.

The micro-steps of a step are shared out, and the gradients added up. A micro-step's data follows from its number alone, so
the same run gives the same numbers (but for the order of additions) on one process, two or eight, and may be stopped on
some and resumed on others.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flux.errors import UserError


@dataclass(frozen=True)
class Team:
    """This process among all; `rank` 0 writes what there is to write."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, accumulate: int) -> range:
        """The micro-steps of a step that are this process's."""
        if accumulate % self.size:
            raise UserError(f"--accumulate {accumulate} on {self.size} processes; expected a multiple of {self.size}: they "
                            f"share the micro-steps; try --accumulate {self.size}")
        return range(self.rank, accumulate, self.size)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The leader first and the others after it: what must not be cleared up or written by two at a time."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    @contextmanager
    def together(self, device: str) -> Iterator[None]:
        """What stops one process inside stops all of them after it, and none waits for ever for one that is gone."""
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except (UserError, KeyboardInterrupt) as error:
            problem = error
        worst = torch.tensor(0 if problem is None else 1 if isinstance(problem, KeyboardInterrupt) else 2, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if worst:
            raise problem or (KeyboardInterrupt() if worst == 1 else UserError("another process stopped and said why"))

    def total(self, value: float, device: str) -> float:
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return summed.item()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every process's gradients become the sum of all. A parameter without one in some process counts as zero there."""
        if self.size == 1:
            return
        parameters = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        used = [p for p, some in zip(parameters, has.tolist(), strict=True) if some]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in used])
        dist.all_reduce(flat)
        for p, summed in zip(used, flat.split([p.numel() for p in used]), strict=True):
            p.grad = torch.empty_like(p).copy_(summed.view(p.shape))

    @torch.no_grad()
    def same(self, tensors: Iterable[Tensor]) -> None:
        """Everyone has the leader's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def join() -> Team:
    """The team that torchrun has started, or oneself alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Team()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Team(dist.get_rank(), size)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
