"""Several processes as one training: `torchrun --nproc-per-node 2 train.py ... --accumulate 2`.

The micro-steps of a step are shared out, and torch's engines add up the gradients: DistributedDataParallel, where every
process holds everything, or with --shard FSDP2 (`fully_shard`), where each holds its part of weights, average and moments. A
micro-step's data follows from its number alone, so the same run gives the same numbers (but for the order of additions)
on one process, two or eight, and may be stopped on some and resumed on others.
"""

import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flux.errors import UserError


class Act(nn.Module):
    """A task as a module: the engines act where a module is called. `Act(task)("loss", batch)` is `task.loss(batch)`."""

    def __init__(self, task):
        super().__init__()
        self.model, self.task = task.trainable(), task

    def forward(self, name: str, *args):
        return getattr(self.task, name)(*args)


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

    def engine(self, task, shard: bool = False, recompute: bool = False) -> nn.Module:
        """The task as a module whose backward pass leaves in every process the mean of all processes' gradients.

        shard: the task's parameters become DTensors, split over the processes along their first dimension. recompute: the
        transformer's blocks keep their inputs only and run again in the backward pass.
        """
        act = Act(task)
        blocks = [block for name, block in act.named_modules() if re.search(r"(double|single)_blocks\.\d+$", name)]
        for block in blocks if recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if shard:
            return self.sharded(act, blocks)
        # a parameter without a gradient in some micro-step, or in all, is no error
        return act if self.size == 1 else DistributedDataParallel(act, find_unused_parameters=True)

    def sharded(self, act: Act, blocks: list[nn.Module]) -> nn.Module:
        """Each block by itself, so that the whole weights of one or two are there at a time; the rest together.

        Every process must then use the same parameters in a micro-step: FSDP2 exchanges the gradients that there are.
        """
        from torch.distributed.fsdp import fully_shard  # here, since its import takes a second

        if self.size == 1:
            raise UserError("--shard on one process; expected several to share the weights: start it with "
                            "torchrun --nproc-per-node N, or leave --shard out")
        mesh = dist.init_device_mesh(kind(), (self.size,))
        for module in (*blocks, act):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or the average would stay after a look at it
            module.set_force_sum_reduction_for_comms(True)  # gloo has no average of its own
        return act

    def gathering(self, engine: nn.Module, last: bool):
        """Around a micro-step, forward and backward: gradients are exchanged in the last one, all at once."""
        return engine.no_sync() if isinstance(engine, DistributedDataParallel) and not last else nullcontext()

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
    def together(self) -> Iterator[None]:
        """What stops one process inside stops all of them after it, and none waits for ever for one that is gone."""
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except (UserError, OSError, KeyboardInterrupt) as error:
            problem = error
        worst = torch.tensor(0 if problem is None else 1 if isinstance(problem, KeyboardInterrupt) else 2, device=kind())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if worst:
            raise problem or (KeyboardInterrupt() if worst == 1 else UserError("another process stopped and said why"))

    def total(self, value: float) -> float:
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=kind())
        dist.all_reduce(summed)
        return summed.item()


ALONE = Team()


def kind() -> str:
    """Where the processes meet."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def bare(engine: nn.Module) -> Act:
    """The same without the exchange of gradients."""
    return engine.module if isinstance(engine, DistributedDataParallel) else engine


def is_split(tensor: Tensor) -> bool:
    """A DTensor, asked for without its import."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """All of a split tensor; every process must ask for it."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor."""
    return tensor.to_local() if is_split(tensor) else tensor


def join() -> Team:
    """The team that torchrun has started, or oneself alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  before the group is there: its functions' defaults would keep it for ever

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Team(dist.get_rank(), size)


def leave() -> None:
    """Every process, as its last act. gloo's threads still hold the last exchanged tensors for a moment; one that lets go of
    them while the interpreter ends aborts the process (SIGABRT), after all was saved."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()  # engines, in cycles: with the last one goes the group, and waits for its threads
        time.sleep(0.2)  # FSDP2 keeps the group
