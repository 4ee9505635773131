"""Networks larger than the device's memory: the matrices of a block are there while it computes, and those of the next
one on their way.

They stay in the file that they are mapped from. A hook before each block's forward puts them on the device in the dtype of
the computation, and lets a thread fetch those of the block after it; a hook behind it takes them off again. Two blocks are
in memory at most, and numbers are the same as when all are. Names do not change, so LoRAs go beside streamed layers as
beside any other.

On the CPU a file in the dtype of the computation needs none of this: its pages come and go as the system likes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

Matrices = list[tuple[nn.Linear, str, Tensor]]  # layer, name of its parameter, what it is to compute with


@dataclass
class Fetched:
    matrices: Matrices
    ready: torch.cuda.Event | None  # when they have arrived on a GPU


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost lists in a network, which run one after the other."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def linears(block: nn.Module) -> list[nn.Linear]:
    return [layer for layer in block.modules() if isinstance(layer, nn.Linear)]


def streamed(model: nn.Module, dtype: torch.dtype, device: torch.device, check: Callable[[], None] = lambda: None
             ) -> nn.Module:
    """The linear layers of its blocks come when they are needed; all else goes to the device now.

    `model` is on the CPU as `weights.load` maps it, in the file's dtype. `check` is called before a block is read.
    """
    late = {layer for block in blocks(model) for layer in linears(block)}
    for layer in late:
        layer.compute_dtype, layer.compute_device = dtype, device  # what LoRAs beside it ask for
    move(model, dtype, device, late)
    stream = Stream(list(blocks(model)), dtype, device, check)
    for block in stream.blocks:
        block.register_forward_pre_hook(stream.bring)
        block.register_forward_hook(stream.take, always_call=True)
    return model


def move(model: nn.Module, dtype: torch.dtype, device: torch.device, but: set[nn.Module]) -> nn.Module:
    """Parameters and buffers to the device, floating-point ones in this dtype; those of some layers stay."""
    for layer in set(model.modules()) - but:
        for name, tensor in layer.named_parameters(recurse=False):
            new = tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
            setattr(layer, name, nn.Parameter(new, requires_grad=False))
        for name, tensor in layer.named_buffers(recurse=False):
            setattr(layer, name, tensor.to(device, dtype if tensor.is_floating_point() else None))
    return model


class Stream:
    """Brings each block's matrices and takes them off again; one thread fetches one block ahead.

    Blocks that are left out, or run in another order, cost a fetch that nobody used, and are computed all the same.
    """

    def __init__(self, blocks: list[nn.Module], dtype: torch.dtype, device: torch.device, check: Callable[[], None]):
        self.blocks, self.dtype, self.device, self.check = blocks, dtype, torch.device(device), check
        self.following = dict(pairwise(blocks))
        self.worker = ThreadPoolExecutor(1, "weights")
        self.ahead: tuple[nn.Module, Future[Fetched]] | None = None
        self.kept: Matrices = []  # what lies in the file, of the block that computes
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.done: torch.cuda.Event | None = None  # when the last block has computed on a GPU

    def bring(self, block: nn.Module, _) -> None:
        expected, coming = self.ahead or (None, None)
        self.ahead = None
        if expected is not block:
            coming = self.worker.submit(self.fetch, block, self.done)
        fetched = coming.result()
        if fetched.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(fetched.ready)
            for _, _, tensor in fetched.matrices:
                tensor.record_stream(current)  # its memory was asked for by the other stream
        self.kept = put(fetched.matrices)
        if (following := self.following.get(block)) is not None:
            self.ahead = following, self.worker.submit(self.fetch, following, self.done)

    def take(self, *_) -> None:
        put(self.kept)
        self.kept = []
        if self.side is not None:
            self.done = torch.cuda.current_stream(self.device).record_event()

    @torch.no_grad()
    def fetch(self, block: nn.Module, done: "torch.cuda.Event | None") -> Fetched:
        """In the thread. On a GPU it waits until the block before last has computed, or three would be in memory."""
        self.check()
        parts = [(layer, name, p) for layer in linears(block) for name, p in layer.named_parameters(recurse=False)]
        if self.side is None:
            return Fetched([(layer, name, p.to(self.device, self.dtype)) for layer, name, p in parts], None)
        if done is not None:
            done.synchronize()
        with torch.cuda.stream(self.side):  # copies from pinned memory run beside the computation
            there = [(layer, name, p.pin_memory().to(self.device, non_blocking=True).to(self.dtype))
                     for layer, name, p in parts]
            return Fetched(there, self.side.record_event())


def put(matrices: Matrices) -> Matrices:
    """Each into its layer; what was there before. A module's own table, as setattr would refuse what is no Parameter."""
    before = [(layer, name, layer._parameters[name]) for layer, name, _ in matrices]
    for layer, name, tensor in matrices:
        layer._parameters[name] = tensor
    return before
