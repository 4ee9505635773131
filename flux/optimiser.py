"""What turns gradients into steps: AdamW, or Muon for the matrices inside the blocks with AdamW for the rest."""

import torch
from torch import Tensor, nn


def build(model: nn.Module, settings) -> "torch.optim.AdamW | MuonAdamW":
    """An optimiser of the parameters that require grad, with the learning rate, beta2 and decay of the settings."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in parameters.items() if settings.optimiser == "muon" and is_hidden(name, p)]
    rest = [p for name, p in parameters.items() if settings.optimiser == "adamw" or not is_hidden(name, p)]
    groups = [{"params": rest}]
    if (plus := getattr(settings, "plus", 1.0)) != 1:  # LoRA+ (arXiv 2402.12354): B learns faster than A
        fast = {id(p) for name, p in parameters.items() if name.endswith(".trained.B")}
        groups = [{"params": [p for p in rest if (id(p) in fast) == scaled], "lr_scale": plus if scaled else 1.0}
                  for scaled in (False, True)]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay,
                              fused=True) if rest else None
    if not hidden:
        return adamw
    muon = torch.optim.Muon(hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAdamW([muon] if adamw is None else [muon, adamw])


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
