"""Encoders of LoRAs: as published, and ours, which may depend on what a LoRA does and on nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import golden
from flux import lora_layers, lora_names
from flux.config import DEMO, DEV, TINY
from flux.errors import UserError
from flux.model import Flux
from lora import encoder, io, probes
from lora.adapter import Adapter, Bias, Dense, Dora, LoHa, LoKr, LowRank, delta
from lora.encoder import Encoder, Prompter, Reference, Sizes
from lora.probes import Layer, changes

LAYERS = lora_layers.layers(TINY)
SMALL = Sizes(width=32, depth=2, heads=2, head_dim=16, hidden=48, probes=3, narrow=12, out=20)
MANIFEST = Path(__file__).parent / "manifests" / "diffsynth_lora_encoder.json"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(rank: int = 3, seed: int = 0, layers=LAYERS) -> Adapter:
    return Adapter({layer.name: (LowRank(draw(rank, layer.inputs, seed=seed + 2 * i) / layer.inputs ** 0.5,
                                         draw(layer.rows, rank, seed=seed + 2 * i + 1) * 0.1, 0.5),)
                    for i, layer in enumerate(layers)})


def made(kind, layers=LAYERS) -> nn.Module:
    """With positions and null tokens that are not zero, as after training."""
    torch.manual_seed(0)
    model = kind(layers, replace(SMALL, probes=1) if kind is Reference else SMALL)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def embedded(model: nn.Module, *adapters: Adapter, base=None) -> Tensor:
    return model([changes(adapter, LAYERS, base) for adapter in adapters])


def near(actual: Tensor, expected: Tensor, tol: float = 1e-4) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tol, f"error {error:.3g}"


# --- as published ---

def test_the_prompter_gives_the_numbers_of_diffsynth():
    recorded = golden.load("lora_encoder")
    config = recorded.config
    layers = [Layer(name, kind, inputs, (rows,)) for name, (inputs, rows), kind in config["patterns"]]
    sizes = Sizes(config["embed_dim"], config["layers"], config["heads"], config["head_dim"], config["intermediate"],
                  config["embeds_per_lora"], out=config["embed_dim"])
    model = Prompter(layers, sizes, config["special"])
    model.load_state_dict(recorded.weights)
    given = recorded.inputs
    pairs = {layer.name: [given[f"{layer.name}.lora_{side}.weight"] for side in "AB"] for layer in layers}
    loras = [changes(Adapter({name: (LowRank(*pair),) for name, pair in pairs.items()}), layers)]
    with torch.no_grad():
        recorded.close(model.embedder(loras), "embeds")
        recorded.close(model(loras), "emb")


def test_the_full_size_prompter_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = Prompter([lora_layers.in_diffsynth(layer) for layer in lora_layers.layers(DEV.flux)])
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == json.loads(MANIFEST.read_text())


def test_the_full_size_reference_has_the_published_count():
    with torch.device("meta"):
        count = sum(p.numel() for p in Reference(lora_layers.layers(DEV.flux)).parameters())
        ours = sum(p.numel() for p in Encoder(lora_layers.layers(DEV.flux)).parameters())
    assert count == 112_902_912
    assert ours < count / 3


def test_the_layers_are_all_of_the_blocks():
    for preset in (DEV, DEMO):
        with torch.device("meta"):
            blocks = {name: tuple(layer.weight.shape) for name, layer in Flux(preset.flux).named_modules()
                      if isinstance(layer, nn.Linear) and "_blocks." in name}
        ours = lora_layers.layers(preset.flux)
        assert {layer.name: (layer.rows, layer.inputs) for layer in ours} == blocks
    assert len(lora_layers.layers(DEV.flux)) == 304


def test_the_reference_reads_layer_by_layer():
    """Against the equations of section 2.1, layer by layer in dense matrices; and it needs every layer."""
    model, adapter = made(Reference), lora()
    tokens = []
    for i, layer in enumerate(LAYERS):
        probe = model.embedder.model_dict[encoder.key(layer.name)].x[0, 0]
        weight = model.embedder.proj_dict[encoder.key(layer.type)]
        tokens.append(weight(delta(adapter.layers[layer.name], (layer.rows, layer.inputs)) @ probe) + model.positions[i])
    x = torch.stack(tokens)[None]
    for block in model.encoders:
        x = block(x, torch.ones(len(LAYERS), len(LAYERS), dtype=torch.bool).tril())
    near(embedded(model, adapter), model.final_layer_norm(x).mean(dim=1), 1e-5)
    with pytest.raises(UserError, match="expected ones of all"):
        embedded(model, Adapter(dict(list(adapter.layers.items())[1:])))


# --- invariance ---

def turned(adapter: Adapter) -> Adapter:
    """(R A, B R^-1), with another R in each layer."""
    out = {}
    for i, (name, terms) in enumerate(adapter.layers.items()):
        R = torch.eye(terms[0].rank) + 0.4 * draw(terms[0].rank, terms[0].rank, seed=i)
        out[name] = tuple(replace(term, A=R @ term.A, B=torch.linalg.solve(R.T, term.B.T).T) for term in terms)
    return Adapter(out)


def split(adapter: Adapter) -> Adapter:
    """Each pair as two, of ranks 1 and the rest, one of them cut into two ranges of rows; another scale."""
    def parts(term):
        rows = term.shape[0] // 3
        return (replace(term, A=term.A[:1], B=2 * term.B[:, :1], scale=term.scale / 2),
                replace(term, A=term.A[1:], B=term.B[:rows, 1:]),
                replace(term, A=term.A[1:], B=term.B[rows:, 1:], start=rows))
    return Adapter({name: tuple(part for term in terms for part in parts(term)) for name, terms in adapter.layers.items()})


@pytest.mark.parametrize("same", (turned, split, lambda adapter: split(turned(adapter))))
@pytest.mark.parametrize("kind", (Encoder, Reference))
def test_how_factors_are_written_makes_no_difference(kind, same):
    model, adapter = made(kind), lora()
    near(embedded(model, same(adapter)), embedded(model, adapter))
    assert (embedded(model, lora(seed=99)) - embedded(model, adapter)).norm() > 0.01 * embedded(model, adapter).norm()


@pytest.mark.parametrize("dialect", [name for name in io.WRITERS if name != "xlabs"])
@pytest.mark.parametrize("kind", (Encoder, Reference))
def test_formats_make_no_difference(tmp_path, kind, dialect):
    model, adapter, names = made(kind), lora(), lora_names.names(replace(DEMO, flux=TINY))
    io.write(tmp_path / "it.safetensors", {"flux": adapter}, names, dialect)
    again, _ = io.read(tmp_path / "it.safetensors", names)
    near(embedded(model, again["flux"]), embedded(model, adapter))


def test_all_kinds_are_asked_alike():
    """LoKr, LoHa, DoRA with its base, and what has no low rank, each as its dense difference; biases are not asked."""
    layer = LAYERS[0]
    base = {f"{layer.name}.weight": draw(layer.rows, layer.inputs, seed=5)}
    model = made(Encoder)
    for term in (LoKr(draw(24, 8), (draw(4, 4, seed=1),), 0.2), LoKr(draw(24, 8), (draw(4, 1), draw(1, 4)), 0.2),
                 LoHa((draw(96, 2), draw(2, 32)), (draw(96, 2, seed=1), draw(2, 32, seed=2)), 0.1),
                 LoHa((draw(96, 17), draw(17, 32)), (draw(96, 17, seed=1), draw(17, 32, seed=2)), 0.1),
                 Dense(draw(32, 32), 0.3, 32), LowRank(draw(2, 20), draw(96, 2)),
                 Dora(LowRank(draw(2, 32), draw(96, 2)), draw(96).abs()),
                 Dora(LowRank(draw(2, 32), draw(32, 2), start=32), draw(32).abs()),
                 Dora(LowRank(draw(2, 32), draw(96, 2)), draw(32).abs(), "in"),
                 Dora(LoKr(draw(24, 8), (draw(4, 4, seed=1),)), draw(96).abs())):
        dense = Dense(delta((term,), (layer.rows, layer.inputs), base[f"{layer.name}.weight"]))
        rest = dict(list(lora().layers.items())[1:])
        one, other = (Adapter({layer.name: (each, Bias(draw(96))), **rest}) for each in (term, dense))
        near(embedded(model, one, base=base), embedded(model, other))


def test_a_dora_without_its_base_is_its_plain_delta_and_a_bit():
    model, layer = made(Encoder), LAYERS[0]
    inner = LowRank(draw(2, 32), draw(96, 2))
    dora, plain = (Adapter({layer.name: (term,)}) for term in (Dora(inner, draw(96).abs()), inner))
    assert not torch.equal(embedded(model, dora), embedded(model, plain))
    with torch.no_grad():
        model.shared.weight[:, -1] = 0
    near(embedded(model, dora), embedded(model, plain), 0)


def test_a_batch_of_any_ranks_is_its_members():
    model = made(Encoder)
    loras = [lora(1), lora(5, 1), Adapter(dict(list(lora(2, 7).layers.items())[3:9])), Adapter()]
    near(embedded(model, *loras), torch.cat([embedded(model, each) for each in loras]), 1e-5)


# --- layers that are not there ---

@pytest.mark.parametrize("drop", (False, True))
def test_a_layer_fades_away_without_a_jump(drop):
    """e at strength 10^-k of three layers comes ever closer to e without them, and so does a term of zeros."""
    model, adapter = made(Encoder), lora()
    model.drop_missing = drop
    some = [LAYERS[i].name for i in (0, 4, 11)]
    without = embedded(model, Adapter({name: terms for name, terms in adapter.layers.items() if name not in some}))

    def at(strength: float) -> Tensor:
        faded = {name: (replace(adapter.layers[name][0], scale=strength),) for name in some}
        return embedded(model, Adapter({**adapter.layers, **faded}))
    near(at(0.0), without, 1e-6)
    gaps = [((at(10.0 ** -k) - without).norm() / without.norm()).item() for k in (0, 4, 6, 8, 10, 12)]
    assert gaps[-1] < 1e-4 and gaps[0] > 20 * gaps[-1] and gaps[3] > gaps[4] > gaps[5], gaps


def test_dropped_layers_are_not_attended_to():
    model, adapter = made(Encoder), Adapter(dict(list(lora().layers.items())[:3]))
    model.drop_missing = True
    before = embedded(model, adapter)
    with torch.no_grad():
        model.null["linear1___0"] += 1.0  # of a type that the LoRA does not change
    near(embedded(model, adapter), before, 1e-6)
    model.drop_missing = False
    assert not torch.allclose(embedded(model, adapter), before, rtol=1e-3)


def test_gradients_are_finite_where_nothing_is_changed():
    model = made(Encoder)
    model.drop_missing = True
    model([changes(lora(), LAYERS), {}], noise=torch.Generator().manual_seed(0)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.probes[encoder.key(LAYERS[0].name)].x.grad.any()


def test_augmentation_keeps_what_it_should():
    given = changes(lora(4), LAYERS)
    seen = [probes.augmented(given, torch.Generator().manual_seed(seed)) for seed in range(60)]
    factors, ranks = set(), set()
    for each in seen:
        factors |= {round(change.pair.scale / 0.5, 4) for change in each.values()}
        ranks |= {change.pair.rank for change in each.values()}
    assert min(factors) >= 0.6 and max(factors) <= 1.4 and len(factors) == 60 and ranks == {2, 4}
    share = sum(len(each) for each in seen) / (60 * len(LAYERS))
    assert 0.85 < share < 0.95
    assert list(seen[0]) == list(probes.augmented(given, torch.Generator().manual_seed(0)))


# --- files and mistakes ---

@pytest.mark.parametrize("kind", (Encoder, Reference))
def test_saved_and_loaded_it_is_the_same(tmp_path, kind):
    model = made(kind)
    encoder.save(tmp_path / "e.safetensors", model, {"head.weight": draw(3, 3)}, {"text": "clip"})
    again, more, about = encoder.load(tmp_path / "e.safetensors", LAYERS)
    near(embedded(again, lora()), embedded(model, lora()), 1e-6)  # sums in another order where memory lies otherwise
    assert list(more) == ["head.weight"] and about["text"] == "clip"
    with pytest.raises(UserError, match="for this model's layers"):
        encoder.load(tmp_path / "e.safetensors", lora_layers.layers(DEMO.flux))


def test_other_files_are_no_encoders(tmp_path):
    io.write(tmp_path / "it.safetensors", {"flux": lora()}, lora_names.names(replace(DEMO, flux=TINY)))
    with pytest.raises(UserError, match="is no encoder of LoRAs"):
        encoder.load(tmp_path / "it.safetensors", LAYERS)


def test_a_lora_for_another_model_is_refused():
    with pytest.raises(UserError, match="expected a LoRA for the encoder's model"):
        changes(lora(layers=lora_layers.layers(DEMO.flux)), LAYERS)
