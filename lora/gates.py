"""Gates that let several LoRAs work together (arXiv 2508.02107): what is learned of them, by layer, and their files.

In a linear layer with output y and LoRAs' l_i, a gate weighs every l_i per token and output. The arithmetic, and both its
forms, are in `kernels/gated_lora_linear.py`; here are the parameters. `Published` is the gate as published, under its names:
304 layers and 27.3 M parameters for FLUX.1. `Ours` weighs around the plain sum, and untrained is the plain sum. Norms go
over slices (q, k, v ...) of a row; time and what a LoRA is (its embedding by `encoder.py`) shift a gate. What a LoRA is
and what the others are give each of its outputs a gain, which is multiplied into B and costs nothing in a step. One LoRA
alone is not gated at all. All LoRAs share one set of gates, so their order is of no account.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import checkpoint
from flux.errors import UserError
from kernels.gated_lora_linear import Gate, around_sum, published
from lora.adapter import Adapter, Bias, LowRank, as_low_rank
from lora.algebra import joined, svd_of_product
from lora.encoder import key, sinusoids
from lora.probes import Layer

MOST = 8  # LoRAs at once that have a beta
TERMS = {"full": (), "no_base": ("weight_base",), "no_cross": ("weight_base", "weight_cross"), "no_lora": ("weight_lora",)}
TIME = 16  # features of the time
HEADER = "lora_gates"


@dataclass(frozen=True)
class Options:
    """Of a set of gates; kept in the header of its file."""

    kind: str = "ours"  # or published
    variant: str = "full"  # of TERMS: what is left out of the logit
    compete: bool = False  # a softmax over the LoRAs in place of a sigmoid for each
    embedding: int = 0  # width of what is known of a LoRA; 0 without
    time: bool = True
    slices: bool = True  # norms over slices, not whole rows
    single: bool = False  # gate one LoRA alone too
    gain: int = 0  # features of a LoRA and its company that its outputs' gains are made of; 0 without, needs `embedding`


class LayerGate(nn.Module):
    """What both kinds have, each (O,). Nothing is weighed yet: that is up to `gate`."""

    def __init__(self, layer: Layer, options: Options):
        super().__init__()
        self.slices = layer.slices if options.kind == "ours" and options.slices else (layer.rows,)
        self.options = options
        for name in ("weight_base", "weight_lora", "weight_cross", "bias"):
            setattr(self, name, nn.Parameter(torch.zeros(layer.rows)))
        self.norm_base, self.norm_lora = nn.LayerNorm(layer.rows), nn.LayerNorm(layer.rows)

    def gate(self, count: int) -> Gate:
        """For `count` LoRAs."""
        w_b, w_l, w_c = (torch.zeros_like(self.bias) if name in TERMS[self.options.variant] else getattr(self, name)
                         for name in ("weight_base", "weight_lora", "weight_cross"))
        base, own = self.norm_base, self.norm_lora
        return Gate(w_b, w_l, w_c, self.bias, base.weight, base.bias, own.weight, own.bias, *self.passing(count),
                    self.options.compete)

    def passing(self, count: int) -> tuple[Tensor, Tensor]:
        """k0, k1 (O,): how much of l_i passes."""
        raise NotImplementedError


class Published(LayerGate):
    """Section 3.1: w_out G_i, all weights drawn from N(0, 1) at first."""

    def __init__(self, layer: Layer, options: Options):
        super().__init__(layer, options)
        for name in ("weight_base", "weight_lora", "weight_cross", "bias"):
            nn.init.normal_(getattr(self, name))
        self.weight_out = nn.Parameter(torch.ones(layer.rows))

    def passing(self, count: int) -> tuple[Tensor, Tensor]:
        return published(self.weight_out)


class Ours(LayerGate):
    """Section 3.2: beta(N) (1 + lambda (2 G_i - 1)), all weights zero at first.

    They begin at beta 1 and lambda 1/2, the plain sum. From the spec's 1/sqrt(N) and 0.1 the demo's loss was still greater
    than the sum's after 1,000 steps.
    """

    def __init__(self, layer: Layer, options: Options):
        super().__init__(layer, options)
        parts = len(self.slices)
        self.mix = nn.Parameter(torch.zeros(parts))  # the logit of lambda
        self.beta = nn.Parameter(torch.ones(MOST - 1))
        if options.time:
            self.time = _zero(nn.Linear(TIME, parts))
        if options.embedding:
            self.member = _zero(nn.Linear(64, parts, bias=False))
        if options.gain:
            self.gain = _zero(nn.Linear(options.gain, layer.rows, bias=False))

    def passing(self, count: int) -> tuple[Tensor, Tensor]:
        mix = torch.cat([part.expand(width) for part, width in zip(self.mix.sigmoid(), self.slices, strict=True)])
        return around_sum(mix, 1.0 if count == 1 else self.beta[count - 2], count, self.options.compete)


def _scaled(embeddings: Tensor) -> Tensor:
    """(N, d), each with a mean square of 1."""
    return F.normalize(embeddings, dim=1) * embeddings.shape[1] ** 0.5


def _zero(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class Gates(nn.Module):
    """One gate for each layer. `called`: other names of layers, under which the file has them."""

    def __init__(self, layers: Sequence[Layer], options: Options = Options(),  # noqa: B008  frozen
                 called: Mapping[str, str] | None = None):
        super().__init__()
        self.options, self.layers = options, tuple(layers)
        self.names = {layer.name: key((called or {}).get(layer.name, layer.name)) for layer in layers}
        kind = {"ours": Ours, "published": Published}[options.kind]
        self.model_dict = nn.ModuleDict({self.names[layer.name]: kind(layer, options) for layer in layers})
        if options.embedding:
            self.member_in = nn.Linear(options.embedding + TIME, 64)
        if options.gain:
            self.gain_in = nn.Linear(2 * options.embedding, options.gain)

    def __contains__(self, layer: str) -> bool:
        return layer in self.names

    def of(self, layer: str) -> LayerGate:
        return self.model_dict[self.names[layer]]

    def shared(self, t: Tensor, embeddings: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Times t (B,), what is known of N LoRAs (N, d) -> what all layers' offsets are made of: (B, TIME), (B, N, 64)."""
        own = next(self.parameters())
        time = sinusoids(10 * t.to(own), TIME)  # the fastest turns about once and a half on the way from noise to picture
        if not self.options.embedding:
            return time, None
        assert embeddings is not None, "these gates want to know the LoRAs"
        who = _scaled(embeddings.to(own))
        seen = time if self.options.time else torch.zeros_like(time)
        pairs = torch.cat((who.expand(len(t), -1, -1), seen[:, None].expand(-1, len(who), -1)), dim=-1)
        return time, F.silu(self.member_in(pairs))

    def company(self, embeddings: Tensor) -> Tensor:
        """What is known of N LoRAs (N, d) -> (N, gain): of each and the mean of the others, whatever their order."""
        who = _scaled(embeddings.to(next(self.parameters())))
        others = (who.sum(0) - who) / max(1, len(who) - 1)
        return F.silu(self.gain_in(torch.cat((who, others), dim=1)))

    def gains(self, layer: str, company: Tensor) -> Tensor:
        """(N, O), 1 before training, from 0 to 2: what each LoRA's outputs are multiplied with before the gate. A third of
        the logit, for which the other parameters' learning rate would be too fast."""
        return 2 * torch.sigmoid(self.of(layer).gain(company) / 3)

    def offset(self, layer: str, count: int, time: Tensor, members: Tensor | None) -> Tensor | None:
        """(B, N, slices), which the logits are shifted by, or None."""
        gate, out = self.of(layer), None
        if self.options.kind == "ours" and self.options.time:
            out = gate.time(time)[:, None].expand(-1, count, -1)
        if members is not None:
            out = gate.member(members) if out is None else out + gate.member(members)
        return out


# --- files ---

def save(path: Path, gates: Gates, about: Mapping[str, object] | None = None) -> None:
    """about: what else the header shall say, such as the encoder whose embeddings were learned with."""
    head = {"options": vars(gates.options), "layers": [layer.name for layer in gates.layers], **(about or {})}
    checkpoint.save(path, gates.state_dict(), {HEADER: json.dumps(head)})


def load(path: Path, layers: Sequence[Layer], called: Mapping[str, str]) -> tuple[Gates, dict]:
    """Gates and their header; of a file without one, the published layout is meant. Strict about names and shapes.

    layers: of the model, of which our files may have gates for some only. called: their names in published files.
    """
    tensors = checkpoint.read(path)
    head = checkpoint.read_header(checkpoint.locate(path)).metadata.get(HEADER)
    try:
        about = {"options": {"kind": "published"}} if head is None else dict(json.loads(head))
        options = Options(**about["options"])
        assert options.variant in TERMS
        if some := about.get("layers"):
            assert set(some) <= {layer.name for layer in layers}
            layers = [layer for layer in layers if layer.name in some]
        with torch.device("meta"):
            gates = Gates(layers, options, called if options.kind == "published" else None)
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise checkpoint.refuse(path, "is no set of gates", "one that train.py autolora fusion wrote, or a published one",
                                "name that one") from error
    own = {name: tensor.shape for name, tensor in gates.state_dict().items()}
    found = {name: tensor.shape for name, tensor in checkpoint.layout(tensors).items()}
    if wrong := [name for name in own.keys() | found.keys() if own.get(name) != found.get(name)]:
        raise checkpoint.refuse(path, f"has {checkpoint.listed(sorted(wrong))} missing, unknown or of other shapes",
                                "gates for this model's layers", "train them for it, or take their own model")
    gates.load_state_dict({name: tensors[name].float() for name in own}, assign=True)
    return gates.eval().requires_grad_(False), about


# --- what goes with them ---

def common(adapters: Sequence[Adapter], rank: int = 2) -> Adapter:
    """The Global LoRA of section 3.1: per layer the nearest pair of that rank to the sum of all, from the factors alone."""
    layers: dict[str, list] = {}
    for adapter in adapters:
        for layer, terms in adapter.layers.items():
            layers.setdefault(layer, []).extend(as_low_rank(term) for term in terms if not isinstance(term, Bias))
    out = {}
    for layer, terms in layers.items():
        if not all(isinstance(term, LowRank) for term in terms):
            raise UserError(f"{layer} has a term that is no pair of factors; expected plain LoRAs to make a common one of")
        A, B = joined(terms, 0)
        U, S, V = svd_of_product(B, A)
        root = S[:rank].sqrt()
        out[layer] = (LowRank(root[:, None] * V[:rank], U[:, :rank] * root),)
    return Adapter(out)
