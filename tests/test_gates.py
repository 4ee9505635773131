"""Files of gates, the published layout among them, and the common LoRA."""

import pytest
import torch

from flux import checkpoint, lora_layers
from flux.config import DEV, TINY
from flux.errors import UserError
from lora import gates
from lora.adapter import Adapter, LowRank, delta
from lora.gates import Gates, Options


def called(layers):
    return {layer.name: lora_layers.in_diffsynth(layer).name for layer in layers}


def test_the_published_layout_of_flux():
    """304 layers, nine vectors each, under the names of DiffSynth-Studio/LoRAFusion-preview-FLUX.1-dev."""
    layers = lora_layers.layers(DEV.flux)
    with torch.device("meta"):
        state = Gates(layers, Options(kind="published"), called(layers)).state_dict()
    assert len(layers) == 304 and len(state) == 2736 and sum(t.numel() for t in state.values()) == 27_316_224
    first = "model_dict.blocks___0___attn___a_to_qkv"
    parts = ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias", "norm_base.weight", "norm_base.bias",
             "norm_lora.weight", "norm_lora.bias")
    assert {name for name in state if name.startswith(first)} == {f"{first}.{part}" for part in parts}
    assert state["model_dict.single_blocks___37___to_qkv_mlp.weight_out"].shape == (21504,)
    assert state["model_dict.single_blocks___37___norm___linear.bias"].shape == (9216,)


def test_published_files_come_and_go_unchanged(tmp_path):
    """As published: no header of ours."""
    layers = lora_layers.layers(TINY)
    made = Gates(layers, Options(kind="published"), called(layers))
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    checkpoint.save(theirs, made.state_dict(), {})
    read, about = gates.load(theirs, layers, called(layers))
    gates.save(ours, read, about)
    again, _ = gates.load(ours, layers, called(layers))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, checkpoint.read(ours)[name])
    assert read.options.kind == "published" and layers[0].name in again


def test_ours_come_back_whole(tmp_path):
    layers, path = lora_layers.layers(TINY), tmp_path / "g.safetensors"
    made = Gates(layers, Options(compete=True, embedding=5, variant="no_cross"))
    gates.save(path, made, {"encoder": "abc"})
    read, about = gates.load(path, layers, called(layers))
    assert read.options == made.options and about["encoder"] == "abc"
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in made.state_dict().items())


def test_gates_of_some_layers_are_a_file_too(tmp_path):
    layers, path = lora_layers.layers(TINY), tmp_path / "g.safetensors"
    gates.save(path, Gates(layers[2:4], Options(embedding=5, gain=3)))
    read, _ = gates.load(path, layers, called(layers))
    assert read.layers == layers[2:4] and layers[0].name not in read and read.options.gain == 3
    with pytest.raises(checkpoint.CheckpointError, match="no set of gates"):
        gates.load(path, layers[4:], called(layers))


@pytest.mark.parametrize("spoil", ["missing", "shape", "unknown", "header"])
def test_what_is_no_set_of_gates(tmp_path, spoil):
    layers, path = lora_layers.layers(TINY), tmp_path / "g.safetensors"
    state, header = Gates(layers, Options(kind="published"), called(layers)).state_dict(), {}
    name = next(iter(state))
    if spoil == "missing":
        del state[name]
    elif spoil == "shape":
        state[name] = state[name][:-1].clone()
    elif spoil == "unknown":
        state["more"] = torch.zeros(2)
    else:
        header = {gates.HEADER: '{"options": {"kind": "other"}}'}
    checkpoint.save(path, state, header)
    with pytest.raises(UserError):
        gates.load(path, layers, called(layers))


def test_common_lora_is_the_truncated_svd_of_the_sum():
    g = torch.Generator().manual_seed(0)
    adapters = [Adapter({"a": (LowRank(torch.randn(3, 16, generator=g), torch.randn(10, 3, generator=g), 0.5, 0),
                               LowRank(torch.randn(2, 16, generator=g), torch.randn(10, 2, generator=g), 2.0, 10))})
                for _ in range(3)]
    found = gates.common(adapters)
    U, S, V = torch.linalg.svd(sum(delta(one.layers["a"], (20, 16)) for one in adapters).double())
    expected = (U[:, :2] * S[:2]) @ V[:2]
    assert (delta(found.layers["a"], (20, 16)) - expected).norm() < 1e-4 * expected.norm()
    assert found.layers["a"][0].rank == 2
