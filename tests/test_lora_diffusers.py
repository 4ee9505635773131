"""LoRA files against diffusers and peft themselves, where these are installed: theirs load here, ours load there."""

from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch

from flux import lora_names, naming
from flux.config import DEMO, FluxConfig
from flux.model import Flux
from lora import io
from lora.adapter import Adapter, LowRank
from lora.inject import Loras

pytestmark = pytest.mark.skipif(not (util.find_spec("diffusers") and util.find_spec("peft")),
                                reason="needs pip install diffusers peft transformers")

FULL = FluxConfig(depth=1, depth_single_blocks=1)  # diffusers' readers of other formats know FLUX.1's own widths only
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
           "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm.linear",
           "proj_mlp", "proj_out", "x_embedder", "context_embedder", "norm_out.linear")


def pair(config: FluxConfig):
    """The same network here and there, and a call of each with the same inputs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    ours = Flux(config).eval().requires_grad_(False)
    theirs = FluxTransformer2DModel(
        num_layers=config.depth, num_single_layers=config.depth_single_blocks, num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim, joint_attention_dim=config.context_in_dim, guidance_embeds=True,
        pooled_projection_dim=config.vec_in_dim, axes_dims_rope=config.axes_dim).eval()
    theirs.load_state_dict(dict(naming.to_diffusers(ours.state_dict(), "flux", Path("minflux"))))
    img, txt, vec = torch.randn(1, 16, 64), torch.randn(1, 5, config.context_in_dim), torch.randn(1, config.vec_in_dim)
    t, guidance, cells = torch.tensor([0.6]), torch.tensor([2.0]), torch.arange(16)
    img_ids, txt_ids = torch.stack((0 * cells, cells // 4, cells % 4), dim=-1).float(), torch.zeros(5, 3)

    def here():
        with torch.no_grad():
            return ours(img, img_ids[None], txt, txt_ids[None], vec, t, guidance)

    def there():
        with torch.no_grad():
            return theirs(img, txt, vec, t, img_ids, txt_ids, guidance, return_dict=False)[0]
    return ours, theirs, here, there


def error(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(("dialect", "config"), [("diffusers", DEMO.flux), ("kohya", FULL), ("comfy", FULL)],
                         ids=["diffusers", "kohya", "comfy"])
def test_a_lora_of_ours_loads_in_diffusers(dialect, config, tmp_path):
    """Through its FluxPipeline's own reader, which knows these formats by their keys. Blocks only: diffusers' converter
    of kohya's names refuses LoRAs of the embedders."""
    from diffusers import FluxPipeline

    ours, theirs, here, there = pair(config)
    before = there()
    layers = {}
    for name, layer in ours.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks" in name:
            A = torch.randn(3, layer.in_features) / layer.in_features ** 0.5
            layers[name] = (LowRank(A, 0.1 * torch.randn(layer.out_features, 3), 0.25),)
    adapter = Adapter(layers)
    path = tmp_path / "ours.safetensors"
    io.write(path, {"flux": adapter}, lora_names.names(replace(DEMO, flux=config)), dialect)
    Loras(ours).attach("a", adapter)
    state = FluxPipeline.lora_state_dict(str(path))
    theirs.load_lora_adapter(state, prefix="transformer", adapter_name="a")
    assert error(there(), before) > 1e-3 and error(there(), here()) < 1e-5


def test_a_lora_of_peft_loads_here(tmp_path):
    from peft import LoraConfig

    ours, theirs, here, there = pair(DEMO.flux)
    before = here()
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(TARGETS), init_lora_weights="gaussian"), "a")
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_lora_adapter(tmp_path, adapter_name="a", weight_name="theirs.safetensors")
    path = tmp_path / "theirs.safetensors"
    adapters, report = io.read(path, lora_names.names(DEMO))
    assert not report.unused and set(report.scales) == {0.5}
    Loras(ours).attach("a", adapters["flux"])
    assert error(here(), before) > 0.05 and error(here(), there()) < 1e-5
