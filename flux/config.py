"""Sizes of every network, and the members of the FLUX.1 family as presets.

Defaults are FLUX.1-dev, so a preset states only its difference. Field names are those of the released configurations.
This module imports no torch: the commands read it to print their help.
"""

from dataclasses import dataclass, field, replace

from flux.errors import UserError


@dataclass(frozen=True)
class FluxConfig:
    """The MMDiT (FLUX.1 technical description; attention of arXiv 2403.03206, single blocks of arXiv 2302.05442)."""

    in_channels: int = 64  # 16 latent channels in 2x2 patches; Fill and the control models add theirs
    out_channels: int = 64
    vec_in_dim: int = 768  # pooled CLIP
    context_in_dim: int = 4096  # T5
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head that rotate with frame, row, column
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if self.hidden_size % self.num_heads or sum(self.axes_dim) != self.head_dim:
            raise UserError(f"axes_dim {self.axes_dim} must sum to hidden_size {self.hidden_size} / num_heads "
                             f"{self.num_heads}")
        if any(width % 2 for width in self.axes_dim):
            raise UserError(f"axes_dim {self.axes_dim} must be even: channels rotate in pairs")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class AutoEncoderConfig:
    """The convolutional autoencoder of arXiv 2112.10752 with 16 latent channels."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611  # latents = scale_factor * (z - shift_factor), of about unit variance
    shift_factor: float = 0.1159

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, along one edge."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ClipTextConfig:
    """CLIP's text tower (arXiv 2103.00020), ViT-L/14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # 2 is the released files' legacy value: the pooled row is then the largest id
    projection_dim: int = 768  # of the pair's shared space; FLUX itself uses the unprojected row


@dataclass(frozen=True)
class ClipVisionConfig:
    """CLIP's vision tower, ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768


@dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder (arXiv 1910.10683, with the gated feed-forward of arXiv 2002.05202), XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class SiglipConfig:
    """SigLIP's vision tower (arXiv 2303.15343), so400m patch14-384."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class SwinirConfig:
    """SwinIR as DiffBIR trained it, which LucidFlux reads (general_swinir_v1)."""

    embed_dim: int = 180
    depths: tuple[int, ...] = (6,) * 8
    num_heads: tuple[int, ...] = (6,) * 8
    window_size: int = 8  # cells
    mlp_ratio: float = 2.0
    unshuffle_scale: int = 8  # pixels per cell, along one edge
    num_feat: int = 64  # channels on the way back to pixels
    keeps: bool = False  # say of each picture how much of it to keep: else nothing clean comes back as it is (ours)

    def __post_init__(self):
        for name in ("depths", "num_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def step(self) -> int:
        """Pixels of which the edges of a picture must be multiples."""
        return self.unshuffle_scale * self.window_size


@dataclass(frozen=True)
class LucidConfig:
    """What LucidFlux (arXiv 2509.22414) adds to a transformer of the family, and how its authors sample."""

    depth: int = 2  # double blocks of a branch
    eps: float = 1e-6  # of the modulation's layer norm; near 1, an untrained branch changes nothing
    siglip: SiglipConfig = field(default_factory=lambda: SiglipConfig(image_size=512, patch_size=16))
    swinir: SwinirConfig = field(default_factory=SwinirConfig)
    prompt: str = "restore this image into high-quality, clean, high-resolution result"
    steps: int = 20
    guidance: float = 4.0


@dataclass(frozen=True)
class Preset:
    """One member of the family: its networks, and the settings its authors sample with."""

    name: str = "dev"
    flux: FluxConfig = field(default_factory=FluxConfig)
    autoencoder: AutoEncoderConfig = field(default_factory=AutoEncoderConfig)
    clip: ClipTextConfig = field(default_factory=ClipTextConfig)
    t5: T5Config = field(default_factory=T5Config)
    siglip: SiglipConfig = field(default_factory=SiglipConfig)
    t5_length: int = 512  # tokens
    width: int = 1024  # pixels
    height: int = 1024
    steps: int = 28
    guidance: float = 3.5
    shift: bool = True  # whether the schedule moves towards noise with the number of tokens
    takes: str = ""  # what it was trained to be given beside the prompt: "mask", "control", "reference"
    adapter: str = ""  # LoRA beside the shipped weights that makes the base model this one
    reference_sizes: tuple[tuple[int, int], ...] = ()  # width, height in pixels a reference is resized to; (): its own


# Kontext's, from tall to wide, about one megapixel each (flux.md section 2).
KONTEXT_SIZES = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
                 (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
                 (1568, 672))

DEV = Preset()
KREA = replace(DEV, name="krea", guidance=2.5)
SCHNELL = replace(DEV, name="schnell", flux=FluxConfig(guidance_embed=False), t5_length=256, steps=4, guidance=0.0,
                  shift=False)
FILL = replace(DEV, name="fill", flux=FluxConfig(in_channels=64 + 64 + 256), guidance=30.0, steps=50, takes="mask")
KONTEXT = replace(DEV, name="kontext", guidance=2.5, steps=30, takes="reference", reference_sizes=KONTEXT_SIZES)
CANNY = replace(DEV, name="canny", flux=FluxConfig(in_channels=64 + 64), guidance=30.0, steps=50, takes="control")
DEPTH = replace(CANNY, name="depth", guidance=10.0)
DEMO = Preset(
    name="demo",
    flux=FluxConfig(vec_in_dim=96, context_in_dim=96, hidden_size=192, num_heads=6, depth=2, depth_single_blocks=6,
                    axes_dim=(8, 12, 12)),
    autoencoder=AutoEncoderConfig(ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=1, scale_factor=1.0,
                                  shift_factor=0.0),  # its training folds scale and shift into the weights
    clip=ClipTextConfig(vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                        num_attention_heads=3, projection_dim=96),
    t5=T5Config(vocab_size=256, d_model=96, d_kv=16, d_ff=256, num_layers=2, num_heads=6),
    siglip=SiglipConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
                        image_size=128, patch_size=16),
    t5_length=24, width=128, height=128, steps=20, guidance=2.0,
)
DEMO_FILL = replace(DEMO, name="demo-fill", flux=replace(DEMO.flux, in_channels=64 + 64 + 256), takes="mask",
                    adapter="fill.safetensors")
LUCID = {  # what restores with which member of the family
    "dev": LucidConfig(),
    "demo": LucidConfig(depth=1, eps=1.0, siglip=DEMO.siglip, prompt="", guidance=1.0, swinir=SwinirConfig(
        embed_dim=96, depths=(4, 4), num_heads=(3, 3), num_feat=24, keeps=True)),
}
PRESETS = {preset.name: preset for preset in (DEMO, DEV, KREA, SCHNELL, FILL, KONTEXT, CANNY, DEPTH, DEMO_FILL)}

# Small enough for tests that build a model in milliseconds, with the proportions of the real one.
TINY = FluxConfig(vec_in_dim=24, context_in_dim=28, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=2,
                  axes_dim=(4, 6, 6))


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"model {name!r} is unknown, expected one of {', '.join(PRESETS)}; choose one with --model")
    return PRESETS[name]
