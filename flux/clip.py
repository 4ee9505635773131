"""CLIP: a text and an image tower trained so that a caption and its picture point the same way (arXiv 2103.00020).

FLUX takes one row of the text tower, the caption as a whole, before any projection. Both towers together score a
picture: the CLIP score, PickScore (arXiv 2305.01569) and, on the image embedding alone, LAION's aesthetic head.
Attributes carry the names of the released files, odd spelling included. `flux/siglip.py` uses the same layers.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.config import ClipTextConfig, ClipVisionConfig

# ViT-H/14 of LAION, the towers of PickScore
H14_TEXT = ClipTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                          hidden_act="gelu", projection_dim=1024)
H14_VISION = ClipVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, hidden_act="gelu",
                              projection_dim=1024)

# Of the pictures CLIP learned from, red, green, blue in [0, 1]: the towers take (picture - mean) / std.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

LEGACY_EOS = 2  # the eos id in the config of the released files, which is not the id of their vocabulary


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU (arXiv 1606.08415, section 2) in which OpenAI trained CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def drawn(*shape: int, std: float) -> Tensor:
    """Weights of about this deviation. Not normal_, on whose first use the meta device imports for two seconds."""
    return nn.init.trunc_normal_(torch.empty(shape), std=std)


def table(rows: int, width: int, std: float) -> nn.Embedding:
    return nn.Embedding.from_pretrained(drawn(rows, width, std=std), freeze=False)


def causal_mask(ids: Tensor, keep: Tensor | None) -> Tensor:
    """ids (B, L), keep (B, L), 1 = a token to attend to -> (1 or B, 1, L, L), true where query i may see key j."""
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[None, None]
    return mask if keep is None else mask & keep.bool()[:, None, None]


def pooled_position(ids: Tensor, eos_token_id: int) -> Tensor:
    """ids (B, L) -> (B,) where each caption ends: its first eos, which sees all of it under the causal mask.

    Under the legacy config that is the first of the largest id: eos is the last entry of CLIP's vocabulary.
    """
    return (ids if eos_token_id == LEGACY_EOS else (ids == eos_token_id).int()).argmax(dim=1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (rearrange(proj(x), "b l (h e) -> b h l e", h=self.heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(x, "b h l e -> b l (h e)"))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer; `config` is of any of the three towers, whose sizes go by the same names."""

    def __init__(self, config, act):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, act)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config, act):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, act) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), mask broadcast to (B, H, L, L), true = attend -> (B, L, D), not yet normed."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.token_embedding = table(config.vocab_size, config.hidden_size, std=0.02)  # both as CLIP began
        self.position_embedding = table(config.max_position_embeddings, config.hidden_size, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        length, most = ids.shape[1], self.position_embedding.num_embeddings
        assert length <= most, f"{length} tokens, but positions for {most}"
        return self.token_embedding(ids) + self.position_embedding.weight[:length]


class TextTower(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, ACTIVATIONS[config.hidden_act])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.encoder(self.embeddings(ids), causal_mask(ids, mask))  # (B, L, D)
        last = self.final_layer_norm(x)
        rows = torch.arange(len(ids), device=ids.device)
        return last, last[rows, pooled_position(ids, self.eos_token_id)]


class VisionEmbeddings(nn.Module):
    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(drawn(width, std=width**-0.5))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = table(1 + patches, width, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        assert pixels.shape[-2:] == size, f"pixels {tuple(pixels.shape)}, expected {size}"
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        x = rearrange(x, "b d h w -> b (h w) d")
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, ACTIVATIONS[config.hidden_act])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        last = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))  # (B, 1 + N, D)
        return last, self.post_layernorm(last[:, 0])


class ClipText(nn.Module):
    """The text tower alone, as FLUX uses it."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.text_model = TextTower(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> (B, L, D) after the final norm, and (B, D), its row where the caption ends.

        mask (B, L), 1 = a token to attend to. FLUX gives none: padding is behind the row it takes.
        """
        return self.text_model(ids, mask)


class ClipVision(nn.Module):
    """The image tower alone."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.vision_model = VisionTower(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, S, S) by PIXEL_MEAN and PIXEL_STD -> (B, 1 + N, D) and (B, D).

        The class token and N patches, row by row, without a last norm; and the class token with it.
        """
        return self.vision_model(pixels)


class Clip(nn.Module):
    """Both towers, projected into the space they share."""

    def __init__(self, text: ClipTextConfig, vision: ClipVisionConfig):
        super().__init__()
        assert text.projection_dim == vision.projection_dim, (text.projection_dim, vision.projection_dim)
        self.text_model = TextTower(text)
        self.vision_model = VisionTower(vision)
        self.text_projection = nn.Linear(text.hidden_size, text.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # section 2.5: temperature 0.07 at first

    def embed_text(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, P), not of unit length."""
        return self.text_projection(self.text_model(ids)[1])

    def embed_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) by PIXEL_MEAN and PIXEL_STD -> (B, P), not of unit length."""
        return self.visual_projection(self.vision_model(pixels)[1])

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Images (B, 3, S, S) and captions (C, L) -> (B, C) scaled cosines (figure 3): CLIP's score, or PickScore."""
        image = F.normalize(self.embed_image(pixels), dim=-1)
        text = F.normalize(self.embed_text(ids), dim=-1)
        return self.logit_scale.exp() * image @ text.T


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor v2 on CLIP ViT-L/14: five linears, with nothing between them when not training."""

    def __init__(self, widths: tuple[int, ...] = (768, 1024, 128, 64, 16, 1)):
        super().__init__()
        a, b, c, d, e, f = widths
        self.layers = nn.Sequential(  # the dropouts hold the released numbering
            nn.Linear(a, b), nn.Dropout(0.2), nn.Linear(b, c), nn.Dropout(0.2), nn.Linear(c, d), nn.Dropout(0.1),
            nn.Linear(d, e), nn.Linear(e, f),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Image embeddings (B, 768) of any length -> (B,) scores, about 1 (poor) to 10."""
        return self.layers(F.normalize(image, dim=-1)).squeeze(-1)
