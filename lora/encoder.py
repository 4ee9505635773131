"""Networks that turn a LoRA's weights into a vector: which pictures it makes, told from what it does to probes.

`Reference` is the retriever's encoder as AutoLoRA publishes it (arXiv 2508.02107). `Encoder` is ours: each slice of a layer
is a token of its own, its strength a feature instead of a factor, and any subset of layers will do. `Prompter` is the
reference's sibling that makes tokens of text out of a LoRA. They know no network: its layers are given. Read `probes.py`
first.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux import checkpoint
from flux.errors import UserError
from lora.probes import Changes, Layer, answers

FAINT = 1e-6  # root mean square of D q below which a layer counts as not changed
LEAST = 1e-15  # that of nothing at all, where its gradient still is a number


@dataclass(frozen=True)
class Sizes:
    """Of an encoder. The defaults are ours."""

    width: int = 512
    depth: int = 4  # transformer layers
    heads: int = 8
    head_dim: int = 64
    hidden: int = 2048  # of a transformer layer's MLP
    probes: int = 4  # per layer
    narrow: int = 128  # what each slice's answer to a probe is first brought down to
    out: int = 768  # the text encoder's width


REFERENCE = Sizes(width=768, depth=2, heads=12, hidden=3072, probes=1)
PROMPTER = Sizes(width=4096, depth=1, heads=32, head_dim=128, hidden=8192, probes=16, out=4096)


def key(name: str) -> str:
    """Names of layers as names of modules, which may have no dot; as DiffSynth writes them."""
    return name.replace(".", "___")


# --- the transformer that all share ---

class Attention(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.heads, inner = sizes.heads, sizes.heads * sizes.head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(sizes.width, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, sizes.width)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = (rearrange(to(x), "b l (h e) -> b h l e", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.to_out(rearrange(x, "b h l e -> b l (h e)"))


class Block(nn.Module):
    """A pre-norm transformer layer, with the sigmoid approximation of GELU as in CLIP."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attn = Attention(sizes)
        self.fc1, self.fc2 = nn.Linear(sizes.width, sizes.hidden), nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attn(self.layer_norm1(x), mask, causal)
        y = self.fc1(self.layer_norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


# --- as published ---

class Probe(nn.Module):
    """The probes (1, P, in) of one layer, and in the sibling the norm of its answers."""

    def __init__(self, layer: Layer, count: int, std: float = 1.0, norm: bool = False):
        super().__init__()
        self.x = nn.Parameter(torch.randn(1, count, layer.inputs) * std)
        self.layer_norm = nn.LayerNorm(layer.rows) if norm else nn.Identity()


class Embedder(nn.Module):
    """Whole answers, brought to the width by one projection per type: c = W (D q) + b."""

    def __init__(self, layers: Sequence[Layer], sizes: Sizes, norm: bool):
        super().__init__()
        self.layers = tuple(layers)
        self.model_dict = nn.ModuleDict({key(layer.name): Probe(layer, sizes.probes, norm=norm) for layer in layers})
        self.proj_dict = nn.ModuleDict({key(layer.type): nn.Linear(layer.rows, sizes.width) for layer in layers})

    def forward(self, loras: Sequence[Changes]) -> Tensor:
        """b LoRAs with all m layers -> (b, m * P, D), layers in order."""
        tokens = []
        for layer in self.layers:
            if missing := sum(layer.name not in lora for lora in loras):
                raise UserError(f"{missing} of {len(loras)} LoRAs do not change {layer.name}; expected ones of all "
                                f"{len(self.layers)} layers, which the reference needs; take our own encoder")
            probe = self.model_dict[key(layer.name)]
            y = answers([lora[layer.name] for lora in loras], probe.x[0], layer.rows)
            tokens.append(self.proj_dict[key(layer.type)](probe.layer_norm(y)))
        return torch.cat(tokens, dim=1)


class Reference(nn.Module):
    """Section 2.1: a token per layer, learned positions, two causal layers, the mean. 112.9 M parameters for FLUX.1."""

    def __init__(self, layers: Sequence[Layer], sizes: Sizes = REFERENCE):
        super().__init__()
        self.sizes = sizes
        self.embedder = Embedder(layers, sizes, norm=False)
        self.positions = nn.Parameter(torch.zeros(len(layers), sizes.width))
        self.encoders = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.final_layer_norm = nn.LayerNorm(sizes.width)

    def forward(self, loras: Sequence[Changes]) -> Tensor:
        """b LoRAs -> (b, D), not normalised."""
        x = self.embedder(loras) + self.positions                                     # (b, m, D)
        for block in self.encoders:
            x = block(x, causal=True)
        return self.final_layer_norm(x).mean(dim=1)


class Prompter(nn.Module):
    """A LoRA as tokens of text, to be appended to T5's: DiffSynth's FluxLoRAEncoder, under its names."""

    def __init__(self, layers: Sequence[Layer], sizes: Sizes = PROMPTER, special: int = 1):
        super().__init__()
        self.sizes = sizes
        self.embedder = Embedder(layers, sizes, norm=True)
        self.special_embeds = nn.Parameter(torch.randn(1, special, sizes.width))
        self.encoders = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.final_layer_norm = nn.LayerNorm(sizes.width)
        self.final_linear = nn.Linear(sizes.width, sizes.out)

    def forward(self, loras: Sequence[Changes]) -> Tensor:
        """b LoRAs -> (b, special, out)."""
        special = self.special_embeds.expand(len(loras), -1, -1)
        x = torch.cat((special, self.embedder(loras)), dim=1)
        for block in self.encoders:
            x = block(x)
        return self.final_linear(self.final_layer_norm(x[:, :special.shape[1]]))


# --- ours ---

class Encoder(nn.Module):
    """A token for each slice of each layer; a change that fades away becomes a learned null token, without a jump.

    Which layers there are may differ between two encoders with the same weights but for probes: positions are types,
    streams and sinusoids of the block's number.
    """

    def __init__(self, layers: Sequence[Layer], sizes: Sizes = Sizes(), drop_missing: bool = False):  # noqa: B008  frozen
        super().__init__()
        self.sizes, self.drop_missing = sizes, drop_missing
        self.types = {layer.type: [other for other in layers if other.type == layer.type] for layer in layers}
        for group in self.types.values():
            assert len({(layer.inputs, layer.slices, layer.stream) for layer in group}) == 1, group[0].type
        first = {name: group[0] for name, group in self.types.items()}
        self.probes = nn.ModuleDict({key(layer.name): Probe(layer, sizes.probes, layer.inputs ** -0.5) for layer in layers})
        self.proj = nn.ModuleDict({f"{key(name)}___{i}": nn.Linear(rows, sizes.narrow, bias=False)
                                   for name, layer in first.items() for i, rows in enumerate(layer.slices)})
        self.shared = nn.Linear(sizes.probes * (sizes.narrow + 1) + 1, sizes.width)

        def table(names) -> nn.ParameterDict:
            return nn.ParameterDict({name: torch.randn(sizes.width) * 0.02 for name in names})  # as CLIP's began
        self.null, self.kind = table(self.proj), table(self.proj)
        self.stream = table(dict.fromkeys(key(layer.stream) or "none" for layer in layers))
        self.block_in = nn.Linear(sizes.width // 8 * 2, sizes.width)
        self.special = nn.Parameter(torch.randn(sizes.width) * 0.02)
        self.encoders = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.final_layer_norm = nn.LayerNorm(sizes.width)
        self.final_linear = nn.Linear(sizes.width, sizes.out)

    def forward(self, loras: Sequence[Changes], noise: torch.Generator | None = None) -> Tensor:
        """b LoRAs of any layers and ranks -> (b, out), not normalised. noise: adds 1 % to the answers, for training."""
        parts = [part for name in self.types for part in self.tokens(loras, name, noise)]
        x, presence = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))   # (b, T, D), (b, T)
        x = torch.cat((self.special.expand(len(x), 1, -1), x), dim=1)
        mask = F.pad(presence.log(), (1, 0))[:, None, None] if self.drop_missing else None  # (b, 1, 1, 1 + T)
        for block in self.encoders:
            x = block(x, mask)
        return self.final_linear(self.final_layer_norm(x[:, 0]))

    def tokens(self, loras: Sequence[Changes], type_name: str, noise: torch.Generator | None):
        """For each slice of a type: tokens (b, n, D) of its n layers, and how much each is there, (b, n) in (0, 1)."""
        layers, at = self.types[type_name], key(type_name)
        blocks = torch.tensor([float(layer.block) for layer in layers], device=self.special.device)
        where = self.stream[key(layers[0].stream) or "none"] + self.block_in(sinusoids(blocks, self.block_in.in_features))
        if not any(layer.name in lora for layer in layers for lora in loras):  # the same, without the work
            for i in range(len(layers[0].slices)):
                token = self.null[f"{at}___{i}"] + self.kind[f"{at}___{i}"] + where
                yield token.expand(len(loras), -1, -1), where.new_full((len(loras), len(layers)), LEAST / FAINT)
            return
        y = torch.stack([answers([lora.get(layer.name) for lora in loras], self.probes[key(layer.name)].x[0], layer.rows)
                         for layer in layers], dim=1)                                 # (b, n, P, rows)
        plain = torch.tensor([[float(layer.name in lora and lora[layer.name].undecomposed) for layer in layers]
                              for lora in loras], device=y.device)[..., None]         # (b, n, 1)
        for i, part in enumerate(y.split(layers[0].slices, dim=-1)):
            if noise is not None:
                drawn = torch.randn(part.shape, generator=noise).to(part)
                part = part + 0.01 * rms(part) * drawn
            size = rms(part)                                                          # (b, n, P, 1)
            seen = self.proj[f"{at}___{i}"](part / (size + FAINT))                    # (b, n, P, 128)
            features = torch.cat((seen.flatten(2), (size + FAINT).log().flatten(2), plain), dim=-1)
            there = (size / (size + FAINT)).mean(dim=2)                               # (b, n, 1)
            null = self.null[f"{at}___{i}"]
            token = null + there * (self.shared(features) - null)                     # (b, n, D)
            yield token + self.kind[f"{at}___{i}"] + where, there[..., 0]


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last axis, at least LEAST."""
    return x.square().mean(dim=-1, keepdim=True).clamp(min=LEAST ** 2).sqrt()


def sinusoids(x: Tensor, width: int) -> Tensor:
    """x (n,) -> (n, width): cosines and sines at wavelengths from 2 pi to 1000 times that."""
    rates = torch.exp(-math.log(1000) * torch.arange(width // 2, device=x.device) / (width // 2))
    return torch.cat(((x[:, None] * rates).cos(), (x[:, None] * rates).sin()), dim=-1)


# --- files ---

KINDS = {"ours": Encoder, "reference": Reference}


def save(path: Path, encoder: nn.Module, more: dict[str, Tensor] | None = None, about: dict | None = None) -> None:
    """Weights, and in the header what `load` needs. more: tensors beside the encoder's, such as a text head's."""
    name = next(name for name, kind in KINDS.items() if type(encoder) is kind)
    head = {"kind": name, "sizes": asdict(encoder.sizes), **(about or {})}
    if name == "ours":
        head["drop_missing"] = encoder.drop_missing
    checkpoint.save(path, encoder.state_dict() | (more or {}), {"lora_encoder": json.dumps(head)})


def load(path: Path, layers: Sequence[Layer]) -> tuple[nn.Module, dict[str, Tensor], dict]:
    """The encoder, the tensors beside its own, and what its header says. Strict about all names and shapes."""
    tensors = checkpoint.read(path)
    try:
        about = json.loads(checkpoint.read_header(checkpoint.locate(path)).metadata["lora_encoder"])
        options = {"drop_missing": about["drop_missing"]} if "drop_missing" in about else {}
        with torch.device("meta"):
            encoder = KINDS[about["kind"]](layers, Sizes(**about["sizes"]), **options)
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.refuse(path, "is no encoder of LoRAs", "one that train.py autolora retriever wrote",
                                "name that one") from error
    own = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    wrong = [name for name, shape in own.items() if name not in tensors or checkpoint.layout(tensors)[name].shape != shape]
    if wrong:
        raise checkpoint.refuse(path, f"has {checkpoint.listed(wrong)} missing or of other shapes",
                                "an encoder for this model's layers", "train one for it, or take its own model")
    encoder.load_state_dict({name: tensors[name].float() for name in own}, assign=True)
    return encoder.eval(), {name: tensors[name].float() for name in tensors if name not in own}, about
