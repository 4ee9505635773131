"""How much memory a computation needs at its peak, found by running it on shapes alone.

On the meta device tensors have shapes and lifetimes but no memory. Every operation says what it makes; what is made is
counted until nobody holds it any more. The network that will run is the one that is counted, so a change in a block, a
strip-wise decoder or a stored weight needs no formula here.
"""

import weakref
from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_counted_for = ContextVar("counted_for", default="meta")


def runs_on(x: Tensor) -> str:
    """cpu, cuda, ...: where x is; while memory is counted, where it will be."""
    return _counted_for.get() if x.is_meta else x.device.type


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.known: set[int] = set()  # storages that are alive, by address
        self.now = self.most = 0  # bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.meet(tensor.untyped_storage(), counts=False)  # a weight, or what was made outside
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.meet(tensor.untyped_storage(), counts=True)
        return out

    def meet(self, storage: UntypedStorage, counts: bool) -> None:
        address, size = storage._cdata, storage.nbytes() if counts else 0
        if address not in self.known:
            self.known.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.leave, address, size)

    def leave(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


class _Kernels(TorchFunctionMode):
    """What the kernels do that the meta device does not tell.

    Attention has no matrix of scores, on CPU and GPU. A convolution on the CPU (oneDNN) puts its input into a layout of its
    own: measured are one copy for 3x3, and for 1x1 none in float32 and two in bfloat16. What cuDNN takes is unmeasured.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        copies = []
        if function is F.conv2d:
            x, weight = args[:2]
            count = 1 if weight.shape[-1] > 1 else 2 if x.dtype == torch.bfloat16 else 0
            copies = [torch.empty_like(x) for _ in range(count)]
        out = function(*args, **(kwargs or {}))
        copies.clear()
        return out


@torch.inference_mode()
def peak(work: Callable[[], object], place: str = "meta") -> int:
    """Bytes that `work` holds at most beyond what was there before; all its tensors must be on the meta device.

    place: cpu where it is the CPU's way of computing that counts.
    """
    counting, before = _Counting(), _counted_for.set(place)
    try:
        with torch.device("meta"), _Kernels(), counting:
            work()
    finally:
        _counted_for.reset(before)
    return counting.most
