"""How a picture to edit is shown to Fill: recorded tensors, the formula pixel by pixel, what holds the known part."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux import conditioning, config, edits, fill, flow, latents, pictures
from flux.config import FluxConfig
from flux.edits import Layout
from flux.errors import UserError
from flux.model import Flux
from golden import load

FIELDS = FluxConfig.__dataclass_fields__


class Stub(torch.nn.Module):
    """An autoencoder of one number per cell: means of 8x8 pixels, in 16 channels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, image):
        cells = torch.nn.functional.avg_pool2d(image, 8)
        return cells.repeat(1, 6, 1, 1)[:, :16] * self.weight


@pytest.mark.parametrize(("mode", "layout"), [("mask", Layout(repaint=1.0)), ("edit", Layout(repaint=0.0))])
def test_equals_the_reference(mode, layout):
    golden = load("edit_packing")
    given, settings = golden.inputs, golden.config
    image = pictures.to_tensor(Image.fromarray(given["image_u8"].numpy()))
    mask = edits.soft(Image.fromarray(given["mask_u8"].numpy()), tuple(given["mask_u8"].shape[::-1]))
    mask = (mask > 0.5).float() if mode == "mask" else torch.ones_like(mask)
    shown, mask = layout.shown(image, mask)
    golden.close(shown, f"{mode}_vae_input", 1e-6)
    channels = layout.channels((given["raw_latent"] - 0.1159) * 0.3611, mask)
    golden.close(channels, f"{mode}_cond", 1e-6)
    assert torch.equal(channels[..., 64:], golden.outputs[f"{mode}_cond"][..., 64:])

    model = Flux(FluxConfig(**{name: value for name, value in settings["params"].items() if name in FIELDS}))
    model.load_state_dict(golden.weights)
    cond = conditioning.condition(given["txt"], given["vec"], settings["width"], settings["height"], settings["guidance"])
    velocity = conditioning.velocity(model, conditioning.with_channels(cond, channels))
    with torch.no_grad():
        final = flow.euler(velocity, given["noise"], flow.schedule(settings["steps"], given["noise"].shape[1]))
    golden.close(final, f"{mode}_final")


@pytest.mark.parametrize("repaint", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", edits.MODES)
def test_each_pixel_of_what_is_shown(mode, left, repaint):
    """image * (1 - repaint * mask), on the right or left of a canvas whose other half is the source as it is."""
    rng, layout = torch.Generator().manual_seed(0), Layout(mode, repaint)
    source, mask = torch.rand(3, 3, 16, 48, generator=rng) * 2 - 1, torch.rand(3, 1, 16, 48, generator=rng)
    shown, where = layout.shown(source, mask, left)
    edit, zeros = source * (1 - repaint * mask), torch.zeros_like(mask)
    if mode == "channels":
        assert torch.allclose(shown, edit, atol=1e-7) and torch.equal(where, mask)
        assert layout.canvas(source, edit, left) is edit and layout.cut(edit) is edit
        return
    halves, sides = ((edit, source), (mask, zeros)) if left else ((source, edit), (zeros, mask))
    assert torch.allclose(shown, torch.cat(halves, -1), atol=1e-7) and torch.equal(where, torch.cat(sides, -1))
    assert torch.equal(layout.cut(layout.canvas(source, edit)), edit)


def test_a_white_mask_at_scale_0_shows_all_and_at_1_nothing():
    source, white = torch.rand(2, 3, 32, 16) * 2 - 1, torch.ones(2, 1, 32, 16)
    shown, mask = Layout(repaint=0.0).shown(source, white)
    assert torch.equal(shown, source) and torch.equal(mask, white)
    assert not Layout(repaint=1.0).shown(source, white)[0].any()
    assert torch.equal(Layout(repaint=1.0).shown(source, white / 4)[0], fill.masked(source, white / 4))


def test_channels_and_held_latents_of_a_canvas():
    source, mask = torch.rand(2, 3, 32, 48) * 2 - 1, torch.zeros(2, 1, 32, 48)
    mask[:, :, 8:16, 16:24], mask[0, :, 31, 47] = 1, 0.2
    stub = Stub()
    for layout in (Layout(repaint=0.0), Layout("side-by-side", 1.0), Layout(repaint=0.5, mask_value=0.0)):
        channels, known, true = edits.encode(source, mask, layout, stub, hold=True)
        shown, where = layout.shown(source, mask)
        assert torch.equal(channels[..., :64], latents.pack(stub.encode(shown)))
        assert torch.equal(channels[..., 64:], fill.pack_mask(layout.mask_value * where))
        assert torch.equal(true, latents.pack(stub.encode(layout.canvas(source, source))))
        free = [{(i // 8, j // 8) for i, j in where[b, 0].nonzero().tolist()} for b in range(2)]
        back = latents.unpack(known.float(), 32, where.shape[3]).bool()
        for b in range(2):
            for i in range(4):
                for j in range(where.shape[3] // 8):
                    assert back[b, :, i, j].all() == ((i, j) not in free[b])
        assert edits.encode(source, mask, layout, stub, hold=False)[1:] == (None, None)


def test_soft_masks_stay_soft_and_shrink_by_means():
    grey = Image.fromarray(np.arange(0, 256, dtype=np.uint8).reshape(16, 16))
    same, half = edits.soft(grey, (16, 16)), edits.soft(grey, (8, 8))
    assert torch.equal(same[0, 0] * 255, torch.arange(256.0).view(16, 16))
    means = (same * 255).view(8, 2, 8, 2).mean((1, 3))
    assert (half[0, 0] * 255 - means).abs().max() <= 1


def test_the_mask_value_is_one_constant():
    assert edits.MASK_VALUE == edits.FILL.mask_value == Layout().mask_value == 1 and edits.RELEASED.mask_value == 0


@pytest.mark.parametrize("layout", [("other", 0.0, 1.0), ("channels", -0.1, 1.0), ("channels", 0.0, 2.0),
                                    ("channels", float("nan"), 1.0), ("channels", "0", 1.0)])
def test_nonsense_is_no_layout(layout):
    with pytest.raises(UserError, match="expected channels or side-by-side and numbers from 0 to 1"):
        Layout(*layout)


def test_a_file_says_how_it_was_trained():
    layout = Layout("side-by-side", 0.5, 0.0)
    assert edits.from_metadata(edits.to_metadata(layout, "like this: "), "a") == (layout, "like this: ")
    assert edits.from_metadata({"other": "1"}, "a") is None
    for text in ("", "[]", "{}", '{"mode": "channels", "repaint": 2, "mask_value": 1, "prefix": ""}', "[" * 9999,
                 json.dumps({"mode": ["channels"], "repaint": 0, "mask_value": 1, "prefix": ""})):
        with pytest.raises(UserError, match="a.safetensors says of its own layout"):
            edits.from_metadata({"influxedit": text}, "a.safetensors")


def test_what_changed_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    before = rng.integers(40, 200, (64, 96, 3)).astype(np.uint8)
    after = before.astype(int) + rng.integers(-12, 13, before.shape)
    after[20:40, 30:60] = (200, 20, 20)
    mask = np.asarray(edits.changed(Image.fromarray(before), Image.fromarray(after.astype(np.uint8))))
    assert mask[22:38, 32:58].min() == 255 and mask[:10].max() == mask[50:].max() == mask[:, :20].max() == 0
    kept = np.asarray(fill.keep(Image.fromarray(after.astype(np.uint8)), Image.fromarray(before), Image.fromarray(mask)))
    assert np.array_equal(kept[mask == 0], before[mask == 0]) and np.array_equal(kept[25:35, 35:55], after[25:35, 35:55])


@pytest.mark.parametrize("layout", [Layout(repaint=0.0), Layout("side-by-side", 1.0)])
def test_many_edits_are_each_as_alone(layout):
    torch.manual_seed(0)
    preset = config.Preset(flux=FluxConfig(**vars(config.TINY) | {"in_channels": 384}), steps=3, guidance=2.0)
    model, stub = Flux(preset.flux), Stub()
    stub.decode = lambda x: torch.nn.functional.interpolate(x[:, :3], scale_factor=8)
    source, mask = torch.rand(3, 3, 32, 16) * 2 - 1, torch.ones(3, 1, 32, 16)
    mask[1, :, :16] = 0
    features = torch.randn(3, 5, 28), torch.randn(3, 24)
    drawn = edits.draw(model, stub, preset, layout, source, mask, features, [4, 5, 6])
    assert drawn.shape == source.shape
    alone = edits.draw(model, stub, preset, layout, source[1:2], mask[1:2], tuple(part[1:2] for part in features), [5])
    assert torch.allclose(alone, drawn[1:2], atol=1e-5)
    true = stub.decode(stub.encode(source[1:2]))
    assert torch.allclose(drawn[1:2, :, :16], true[:, :, :16], atol=1e-5)  # known, and held
