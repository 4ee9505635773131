"""LoRAs put on a network and taken off again. All is planned for every layer first; only then is anything changed.

`attach` leaves the weights alone and computes LoRAs beside them; `merge` computes with changed weights. Both are undone bit
for bit: modules and parameters that give way are kept and put back, nothing is subtracted.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from flux.errors import UserError
from lora.adapter import Adapter, Bias, Dora, Term, delta, delta_bias
from lora.layers import Apart, LoraLinear, Plan, TrainedDense, TrainedLora, plan

Strength = float | Callable[[str], float]  # for all layers, or by the layer's name


class Loras:
    """The LoRAs on one network, by name. Strengths change without reading or moving anything but the factors."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.on: dict[str, tuple[Adapter, Strength]] = {}
        self.merged = False
        self._kept: dict[str, nn.Module | nn.Parameter] = {}  # what was in the network, by name, and is not now
        self._wrappers: dict[str, LoraLinear] = {}  # the same ones again and again: a compiled graph knows them

    def attach(self, name: str, adapter: Adapter, strength: Strength = 1.0, widen: bool = False) -> None:
        """UserError, and nothing changed, if something does not fit. `widen`: layers may get inputs beyond their own."""
        check(self.model, adapter, name, widen, self._kept)
        self._put({**self.on, name: (adapter, strength)}, self.merged)

    def detach(self, name: str) -> None:
        self._put({other: pair for other, pair in self.on.items() if other != name}, self.merged)

    def set_strength(self, name: str, strength: Strength) -> None:
        self._put({**self.on, name: (self.on[name][0], strength)}, self.merged)

    def merge(self) -> None:
        """Compute with W + sum of deltas, summed in float32 and rounded once to the weight's dtype."""
        self._put(self.on, merged=True)

    def unmerge(self) -> None:
        self._put(self.on, merged=False)

    @property
    def layers(self) -> dict[str, tuple[nn.Module, dict[str, tuple[tuple[Term, ...], float]]]]:
        """By layer that now bears LoRAs beside it: the layer itself, and the terms and strength of each LoRA that it has."""
        beside = [layer for layer in self._kept if layer in self._wrappers and not self.merged]
        return {layer: (self._wrappers[layer].base, {
            name: (adapter.layers[layer], _strength(strength, layer))
            for name, (adapter, strength) in self.on.items() if layer in adapter.layers}) for layer in beside}

    def set_plans(self, plans: Mapping[str, Plan | Apart]) -> None:
        """What is added in these layers, in place of the plan of all LoRAs at their strengths; until something changes."""
        for layer, each in plans.items():
            self._wrappers[layer].plan = each

    @torch.inference_mode(False)  # what is made here may be used in training too
    @torch.no_grad()
    def _put(self, on: dict[str, tuple[Adapter, Strength]], merged: bool) -> None:
        loras = {}
        for adapter, strength in on.values():
            for layer, terms in adapter.layers.items():
                loras.setdefault(layer, []).append((terms, _strength(strength, layer)))
        for layer, wrapper in self._wrappers.items():
            if wrapper.trained is not None and layer in self._kept and (merged or layer not in loras):
                raise UserError(f"{layer} has a LoRA in training beside the given ones, expected them to stay while it is "
                                "trained; their strengths may change")
        fresh = {}
        for layer, pairs in loras.items():
            base = self._original(layer)
            if isinstance(base, LoraLinear):
                raise UserError(f"{layer} has LoRAs of another kind already, expected a plain layer; attach given LoRAs "
                                "before those to be trained")
            if merged:
                fresh[layer] = merged_linear(base, pairs, layer)
            else:
                if layer not in self._wrappers or self._wrappers[layer].base is not base:
                    self._wrappers[layer] = LoraLinear(base)
                fresh[layer] = self._wrappers[layer], plan(base, pairs)
        for name in {name for adapter, _ in on.values() for name in adapter.replaced}:
            value = own = self._original(name).detach()
            for adapter, strength in on.values():  # whole at any strength but 0, as in BFL's control LoRAs; the last wins
                if name in adapter.replaced and _strength(strength, name):
                    value = adapter.replaced[name].to(own)
            fresh[name] = nn.Parameter(value, requires_grad=False)
        # from here on nothing can fail
        for name, original in self._kept.items():
            _set(self.model, name, original)
        self._kept = {name: self._original(name) for name in fresh}
        for name, new in fresh.items():
            if isinstance(new, tuple):
                new, new.plan = new[0], new[1]
            _set(self.model, name, new)
        self.on, self.merged = on, merged

    def _original(self, name: str) -> nn.Module | nn.Parameter:
        return self._kept[name] if name in self._kept else _get(self.model, name)


def _strength(strength: Strength, name: str) -> float:
    value = float(strength(name) if callable(strength) else strength)
    if not math.isfinite(value):
        raise UserError(f"strength {value} for {name}, expected a finite number; change it")
    return value


def check(model: nn.Module, adapter: Adapter, name: str, widen: bool = False,
          originals: Mapping[str, nn.Module | nn.Parameter] | None = None) -> None:
    """UserError unless every term has a layer of its shape, and every replaced parameter is there.

    `originals`: what counts instead of what now stands in the model.
    """
    modules, parameters, wrong = dict(model.named_modules()), dict(model.named_parameters()), []
    for layer, terms in adapter.layers.items():
        inside = isinstance(modules.get(layer.rpartition(".")[0]), LoraLinear)  # a wrapper's parts are none of the model's
        found = None if inside else (originals or {}).get(layer, modules.get(layer))
        base = found.base if isinstance(found, LoraLinear) else found
        if not hasattr(base, "in_features"):
            wrong.append(f"{layer}, which the model does not have")
            continue
        for term in terms:
            rows, columns = (*term.shape, base.in_features)[:2]
            wide = columns > base.in_features and not widen
            if term.start < 0 or term.start + rows > base.out_features or columns < base.in_features or wide:
                wrong.append(f"{layer} {(term.start + rows, columns)} for {(base.out_features, base.in_features)}")
            if isinstance(term, Dora) and columns != base.in_features:
                wrong.append(f"{layer} by DoRA with more inputs than it has")
            if isinstance(term, Bias) and getattr(base, "bias", None) is None:
                wrong.append(f"a bias for {layer}, which has none")
    for key, value in adapter.replaced.items():
        own = parameters.get(key)
        if own is None or own.shape != value.shape or hasattr(modules[key.rpartition(".")[0]], "in_features"):
            wrong.append(f"{key} {tuple(value.shape)}, which the model does not have")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"LoRA {name} changes {'; '.join(wrong[:3])}{more}; expected layers of this model: check --model")


def merged_linear(base: nn.Module, loras: list[tuple[tuple[Term, ...], float]], layer: str) -> nn.Linear:
    """A linear layer of the class of `base`, with W + sum of s_i delta_i; wider than `base` where a LoRA is."""
    if not isinstance(base, nn.Linear):
        raise UserError(f"{layer} is stored as {type(base).__name__}, expected plain weights to merge into; leave the LoRA "
                        "beside them")
    weight, bias = base.weight.detach(), base.bias
    changes = [(strength, delta(terms, tuple(weight.shape), weight.cpu())) for terms, strength in loras if strength]
    if changes:
        total = sum(F.pad(change, (0, max(c.shape[1] for _, c in changes) - change.shape[1])) * s for s, change in changes)
        wide = F.pad(weight.float(), (0, total.shape[1] - weight.shape[1]))
        weight = (wide + total.to(weight.device)).to(weight.dtype)
    for terms, strength in loras:
        change = delta_bias(terms, base.out_features)
        if change is not None and strength:
            bias = (bias.detach().float() + strength * change.to(bias.device)).to(bias.dtype)
    with torch.device("meta"):
        out = type(base)(weight.shape[1], weight.shape[0], bias=bias is not None)  # whose product may be quicker
    out.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        out.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return out.train(base.training)


def add_trained(model: nn.Module, pattern: str, rank: int, alpha: float | None = None, stabilised: bool = False
                ) -> dict[str, TrainedLora]:
    """A fresh LoRA to train beside every linear layer whose name matches the pattern (re.search); {layer: factors}.

    Scale alpha / rank, or alpha / sqrt(rank) if rank-stabilised (arXiv 2312.03732); alpha is the rank if not given. The
    rest of the network is frozen. It changes nothing until B has learned something.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error}), expected one such as 'attn|linear1': change "
                        "--target") from error
    made, scale = {}, (rank if alpha is None else alpha) / (rank ** 0.5 if stabilised else rank)
    modules, frozen = dict(model.named_modules()), list(model.parameters())
    for layer, found in modules.items():
        inside = isinstance(modules.get(layer.rpartition(".")[0]), LoraLinear)
        if isinstance(found, nn.Linear | LoraLinear) and not inside and re.search(pattern, layer):
            wrapper = found if isinstance(found, LoraLinear) else LoraLinear(found)
            base = wrapper.base
            wrapper.trained = made[layer] = TrainedLora(base.in_features, base.out_features, rank, scale, base.weight.device)
            _set(model, layer, wrapper)
    if not made:
        raise UserError(f"no linear layer is called like {pattern!r}; expected a regular expression such as "
                        f"'blocks' or 'attn|linear1': change --target")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return made


def add_trained_whole(model: nn.Module, layer: str) -> TrainedDense:
    """A change of one linear layer, weight and bias, to train beside it; the layer itself is frozen."""
    found = _get(model, layer)
    wrapper = found if isinstance(found, LoraLinear) else LoraLinear(found)
    if wrapper.trained is not None:
        raise UserError(f"{layer} has a LoRA in training, expected it to be trained whole or by a LoRA; change --target")
    base = wrapper.base.requires_grad_(False)
    wrapper.trained = TrainedDense(base.in_features, base.out_features, base.weight.device)
    _set(model, layer, wrapper)
    return wrapper.trained


@contextmanager
def training(model: nn.Module, pattern: str, rank: int, alpha: float | None = None) -> Iterator[dict[str, TrainedLora]]:
    """`add_trained` for a while: after it the model is what it was, its parameters as frozen as they were before."""
    before, wanted = dict(model.named_modules()), [p for p in model.parameters() if p.requires_grad]
    made = add_trained(model, pattern, rank, alpha)
    try:
        yield made
    finally:
        for layer in made:
            _get(model, layer).trained = None
            _set(model, layer, before[layer])
        for parameter in wanted:
            parameter.requires_grad_(True)


def freeze(model: nn.Module, pattern: str) -> None:
    """Parameters whose name matches (re.search) are not trained."""
    for name, parameter in model.named_parameters():
        if re.search(pattern, name):
            parameter.requires_grad_(False)


def _get(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, value)
