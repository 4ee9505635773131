"""What turns gradients into steps: AdamW; Muon for the matrices inside the blocks with AdamW for the rest; or any other.

All of them show `param_groups`, `step`, `zero_grad`, and a `state` of tensors by parameter, which checkpoints keep.
"""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from flux.errors import UserError


def build(model: nn.Module, settings) -> "torch.optim.AdamW | MuonAdamW | Foreign":
    """An optimiser of the parameters that require grad, with the learning rate, beta2 and decay of the settings."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in parameters.items() if settings.optimiser == "muon" and is_hidden(name, p)]
    scaled: dict[tuple[str, float], list[nn.Parameter]] = {("", 1.0): []}
    for name, p in parameters.items():
        if settings.optimiser != "muon" or not is_hidden(name, p):
            scaled.setdefault(scale_of(name, settings), []).append(p)
    groups = [{"params": some, "lr_scale": scale} for (_, scale), some in scaled.items() if some]
    if settings.optimiser not in ("adamw", "muon"):
        return Foreign(by_path(settings.optimiser, groups, settings))
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay,
                              fused=True) if groups else None
    if not hidden:
        return adamw
    muon = torch.optim.Muon(hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAdamW([muon] if adamw is None else [muon, adamw])


def scale_of(name: str, settings) -> tuple[str, float]:
    """The group of a parameter, and its learning rate over that of the settings."""
    for start, scale in getattr(settings, "lr_scales", {}).items():
        if name.startswith(start):
            return start, scale
    if name.endswith(".trained.B") and getattr(settings, "plus", 1.0) != 1:  # LoRA+ (arXiv 2402.12354)
        return "B", settings.plus  # learns faster than A
    return "", 1.0


def is_hidden(name: str, p: Tensor) -> bool:
    """A matrix between two hidden activations of a block. Tables and modulations, whose rows are looked up or added up,
    have no business being orthogonal."""
    return p.ndim == 2 and "block" in name and "mod" not in name and "bias" not in name


class MuonAdamW:
    """Two optimisers as one: Muon (Jordan 2024, github.com/KellerJordan/Muon) steps with the momentum's nearest
    orthogonal matrix, scaled to AdamW's usual size (arXiv 2502.16982, section 2.2), so that both share a learning rate."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = parts[0].state  # one for all: a parameter's state lies under the parameter
        for part in parts[1:]:
            part.state = self.state

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def room_for_state(name: str, p: Tensor, group: Mapping, layout: Mapping[str, Tensor], remedy: str) -> dict[str, Tensor]:
    """Room for the saved state of one parameter, laid out in memory like it: fused AdamW walks over both side by side.

    Empty for a parameter that never had a gradient. layout: what the file holds, as `exp_avg.` and the parameter's name.
    """
    ends = {full: len(full) - len(name) - 1 for full in layout if full.endswith(f".{name}")}
    found = {full[:end]: layout[full] for full, end in ends.items() if "." not in full[:end]}
    expected = ("momentum_buffer",) if "ns_steps" in group else ("step", "exp_avg", "exp_avg_sq")
    if found and "foreign class" not in group and found.keys() != set(expected):
        raise UserError(f"of {name} the moments {', '.join(sorted(found))} were saved; expected {', '.join(expected)}, as "
                        f"this run's optimiser keeps them; choose the same --optimiser as {remedy}")
    return {key: torch.empty_like(p.detach()) if about.shape == p.shape else
            torch.empty(about.shape, dtype=about.dtype, device=p.device) for key, about in found.items()}


def by_path(path: str, groups: list[dict], settings) -> torch.optim.Optimizer:
    """`package.module.Class`, built with as much of lr, betas and weight_decay as it takes."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        known = inspect.signature(kind).parameters
        given = {"lr": settings.lr, "betas": (0.9, settings.beta2), "weight_decay": settings.weight_decay}
        return kind(groups, **{key: value for key, value in given.items() if key in known})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--optimiser {path}: {error}; expected adamw, muon, or the import path of an installed class such "
                        "as prodigyopt.Prodigy") from error


class Foreign:
    """An optimiser of torch's kind by any author. Some keep plain numbers, also in their groups: see `Numbers`."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner, self.param_groups = inner, inner.param_groups
        self.state = Numbers(inner)
        self.step, self.zero_grad = inner.step, inner.zero_grad
        for group in self.param_groups:
            group["foreign class"] = type(inner).__name__


class Numbers(MutableMapping):
    """The state of each parameter with numbers as float64 tensors, which hold them exactly; a group's with its first one.

    An infinite one is a setting that bounds nothing (Prodigy's growth_rate), stays as it is built, and is no part of them.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        self.first = {id(group["params"][0]): group for group in inner.param_groups if group["params"]}

    def __getitem__(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.inner.state:
            return {}
        own = {f"number-{key}" if isinstance(value, int | float) else key: value
               for key, value in self.inner.state[p].items() if isinstance(value, int | float | Tensor)}
        group = {f"group-{key}": value for key, value in self.first.get(id(p), {}).items()
                 if isinstance(value, int | float) and key not in ("lr", "lr_scale") and not math.isinf(value)}
        return {key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                for key, value in (own | group).items()}

    def __setitem__(self, p: Tensor, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            kind, _, name = key.partition("-")
            if kind == "group" and name in self.first[id(p)]:
                self.first[id(p)][name] = type(self.first[id(p)][name])(value.item())
            elif kind == "number":
                self.inner.state[p][name] = int(value) if value == value.round() else value.item()
            else:
                self.inner.state[p][key] = value

    def __ior__(self, other: Mapping) -> "Numbers":
        self.update(other)
        return self

    def __delitem__(self, p: Tensor) -> None:
        del self.inner.state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.inner.state)

    def __len__(self) -> int:
        return len(self.inner.state)
