"""Arithmetic with LoRAs against the dense matrices it never forms, and `python -m lora` command by command."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux import checkpoint, config, lora_names
from flux.config import DEMO, TINY
from flux.errors import UserError
from flux.model import Flux
from lora import __main__ as command
from lora import algebra, io
from lora.adapter import Adapter, Bias, Dense, Dora, LoHa, LoKr, LowRank, delta, delta_bias
from lora.inject import Loras

OUT, IN = 24, 10


def low_rank(rank: int, rows: int = OUT, start: int = 0, scale: float = 1.0, seed: int = 0, columns: int = IN) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g), scale, start)


def loha(seed: int = 0) -> LoHa:
    g = torch.Generator().manual_seed(seed)
    return LoHa(*((torch.randn(OUT, 2, generator=g), torch.randn(2, IN, generator=g)) for _ in range(2)), 0.7)


def dense(adapter: Adapter, layer: str = "x") -> torch.Tensor:
    return delta(adapter.layers[layer], (OUT, IN), dtype=torch.float64)


def near(a, b, tol: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).abs().max() <= tol * b.double().abs().max())


MIXED = Adapter({"x": (low_rank(3, 8, 0, 0.5, 1), low_rank(2, 8, 8, 2.0, 2), loha(3), Bias(torch.arange(24.0)))})
OTHER = Adapter({"x": (low_rank(4, seed=5),), "y": (low_rank(2, seed=6),)})


def test_sums_differences_and_averages_are_the_dense_ones():
    total = algebra.combined([MIXED, OTHER], [0.3, -1.5])
    assert near(dense(total), 0.3 * dense(MIXED) - 1.5 * dense(OTHER), 1e-12)
    assert near(delta_bias(total.layers["x"], OUT), 0.3 * torch.arange(24.0))
    assert near(dense(algebra.averaged([MIXED, OTHER, OTHER])), (dense(MIXED) + 2 * dense(OTHER)) / 3, 1e-12)
    assert dense(algebra.subtracted(OTHER, OTHER)).abs().max() < 1e-12
    assert near(dense(algebra.subtracted(MIXED, OTHER), "x"), dense(MIXED) - dense(OTHER), 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 9, 40])
def test_recompression_is_the_best_of_its_rank(rank):
    """Eckart and Young: the error is the norm of the singular values that are left out."""
    both = algebra.combined([MIXED, OTHER], [1.0, 1.0])
    small, kept = algebra.recompressed(both, rank)
    error = torch.linalg.matrix_norm(dense(small) - dense(both))
    singular = torch.linalg.svdvals(dense(both))
    assert abs(error - singular[rank:].square().sum().sqrt()) <= 1e-5 * singular[0]
    share = (singular[:rank].square().sum() / singular.square().sum()).item()
    assert kept["x"].rank == min(rank, IN) and kept["x"].energy == pytest.approx(share, abs=1e-5)
    assert near(delta_bias(small.layers["x"], OUT), torch.arange(24.0))


def test_rows_that_are_apart_stay_apart():
    apart = Adapter({"x": (low_rank(3, 8, 16, seed=1), low_rank(3, 8, 0, seed=2), low_rank(2, 8, 0, seed=3))})
    small, kept = algebra.recompressed(apart, 2)
    assert [(term.start, term.shape, term.rank) for term in small.layers["x"]] == [(0, (8, IN), 2), (16, (8, IN), 2)]
    for rows in (slice(0, 8), slice(16, 24)):
        U, S, V = torch.linalg.svd(dense(apart)[rows])
        assert near(dense(small)[rows], (U[:, :2] * S[:2]) @ V[:2])


def test_energy_chooses_the_least_rank_that_keeps_it():
    S = torch.tensor([3.0, 2.0, 1.0, 0.0])  # shares 9, 13, 14, 14 of 14
    ranks = [algebra.chosen_rank(S, None, energy) for energy in (0.5, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert algebra.chosen_rank(S, 2, 1.0) == 2 and algebra.chosen_rank(torch.zeros(4), None, 0.9) == 1
    small, kept = algebra.recompressed(OTHER, energy=0.8)
    assert all(each.energy >= 0.8 for each in kept.values()) and kept["x"].rank < 4


def test_inner_products_come_from_the_factors():
    for a, b in ((MIXED, OTHER), (MIXED, MIXED), (OTHER, OTHER)):
        assert algebra.inner(a, b, "x") == pytest.approx((dense(a) * dense(b)).sum().item(), rel=1e-6)
    assert algebra.inner(MIXED, OTHER, "y") == 0 and algebra.norm(OTHER, "y") > 0


@pytest.mark.parametrize("side", [40, 1100])  # decomposed exactly; by random projections
def test_extraction_finds_the_lora_between_two_checkpoints(side):
    torch.manual_seed(0)
    change = low_rank(5, side, columns=side)
    base = {"x.weight": torch.randn(side, side), "x.bias": torch.zeros(side), "y.weight": torch.randn(4, 4)}
    tuned = base | {"x.weight": base["x.weight"] + change.dense(), "x.bias": torch.ones(side)}
    found, kept = algebra.extracted(base, tuned, ["x", "y"], rank=5, dtype=torch.float32)
    assert list(found.layers) == ["x"] and kept["x"].energy == pytest.approx(1, abs=1e-5)
    assert near(delta(found.layers["x"], (side, side)), change.dense(), 1e-4)
    assert near(delta_bias(found.layers["x"], side), torch.ones(side))
    few, kept = algebra.extracted(base, tuned, ["x"], rank=2, dtype=torch.float32)
    singular = torch.linalg.svdvals(change.dense())
    best = singular[:2].square().sum() / singular.square().sum()
    assert kept["x"].energy == pytest.approx(best.item(), abs=1e-3) and few.layers["x"][0].rank == 2


def test_what_is_not_linear_is_refused():
    for term in (Dora(low_rank(2), torch.ones(OUT)), ):
        with pytest.raises(UserError, match="x has DoRA"):
            algebra.combined([Adapter({"x": (term,)})], [1.0])
    for term in (Dense(torch.randn(OUT, IN)), LoKr(torch.randn(2, 2), (torch.randn(12, 5),))):
        with pytest.raises(UserError, match="no pair of factors"):
            algebra.recompressed(Adapter({"x": (term,)}), 2)
    with pytest.raises(UserError, match="replaces 1 norms"):
        algebra.combined([Adapter({}, {"norm.scale": torch.ones(2)})], [1.0])


# --- python -m lora ---

@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two LoRAs for a tiny model, and its checkpoint."""
    tiny = replace(DEMO, name="demo", flux=TINY)
    monkeypatch.setattr(command, "DEMO", tiny)
    monkeypatch.setitem(config.PRESETS, "demo", tiny)
    torch.manual_seed(0)
    model = Flux(TINY)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, rank in (("a", 4), ("b", 2)):
        layers = {layer: (LowRank(torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank), 0.5),)
                  for layer, linear in linears.items() if name == "a" or "single" in layer}
        path = tmp_path / f"{name}.safetensors"
        io.write(path, {"flux": Adapter(layers)}, lora_names.names(tiny), "kohya", {"trigger": "tok"})
    checkpoint.save(tmp_path / "base.safetensors", model.state_dict())
    monkeypatch.chdir(tmp_path)
    return tiny, linears


def opened(tiny, name: str) -> Adapter:
    return io.read(Path(f"{name}.safetensors"), lora_names.names(tiny))[0]["flux"]


def changes(adapter: Adapter, linears) -> dict[str, torch.Tensor]:
    return {layer: delta(terms, tuple(linears[layer].weight.shape), dtype=torch.float64)
            for layer, terms in adapter.layers.items()}


def test_info_says_what_a_file_is(files, capsys):
    command.main(["info", "a.safetensors"])
    text = capsys.readouterr().out
    assert "for demo" in text and "trigger: tok" in text
    assert "ranks              4" in text and "scales alpha/rank  0.5" in text
    assert f"{len(files[1])} layers" in text and "single_blocks.N.linear1" in text


def test_convert_keeps_the_change_in_every_format(files, capsys):
    tiny, linears = files
    for to in io.WRITERS:
        if to in ("diffsynth", "xlabs"):  # have no words for the embedders
            continue
        command.main(["convert", "a.safetensors", f"{to}.safetensors", "--to", to])
        before, after = changes(opened(tiny, "a"), linears), changes(opened(tiny, to), linears)
        assert all(near(after[layer], before[layer], 1e-6) for layer in before) and before.keys() == after.keys()
    with pytest.raises(UserError, match="is there already"):
        command.main(["convert", "a.safetensors", "b.safetensors"])
    with pytest.raises(UserError, match="xlabs has no word for"):
        command.main(["convert", "a.safetensors", "x.safetensors", "--to", "xlabs"])
    assert not Path("x.safetensors").exists()


def test_merge_subtract_and_resize(files, capsys):
    tiny, linears = files
    a, b = (changes(opened(tiny, name), linears) for name in "ab")
    command.main(["merge", "a.safetensors:0.5", "b.safetensors:-2", "ab.safetensors"])
    command.main(["subtract", "a.safetensors", "b.safetensors", "a-b.safetensors"])
    command.main(["resize", "ab.safetensors", "small.safetensors", "--rank", "3"])
    assert "ranks 3 to 3, at least" in capsys.readouterr().out
    both, less = changes(opened(tiny, "ab"), linears), changes(opened(tiny, "a-b"), linears)
    for layer in a:
        other = b.get(layer, torch.zeros_like(a[layer]))
        assert near(both[layer], 0.5 * a[layer] - 2 * other, 1e-6) and near(less[layer], a[layer] - other, 1e-6)
    small = opened(tiny, "small")
    assert max(term.rank for terms in small.layers.values() for term in terms) == 3
    header = checkpoint.read_header(Path("small.safetensors")).metadata
    assert header["ss_network_dim"] == "3" and "ab.safetensors" in header["minflux"]


def test_merge_into_a_checkpoint_is_what_the_model_computes(files):
    tiny, _ = files
    command.main(["merge", "a.safetensors", "b.safetensors:0.3", "whole.safetensors", "--into", "base.safetensors"])
    model = Flux(TINY)
    model.load_state_dict(dict(checkpoint.read(Path("base.safetensors"))))
    loras = Loras(model)
    loras.attach("a", opened(tiny, "a"))
    loras.attach("b", opened(tiny, "b"), 0.3)
    loras.merge()
    for name, tensor in checkpoint.read(Path("whole.safetensors")).items():
        assert near(tensor, model.state_dict()[name], 1e-6), name
    command.main(["extract", "base.safetensors", "whole.safetensors", "found.safetensors", "--rank", "6", "--model", "demo"])
    command.main(["merge", "a.safetensors", "b.safetensors:0.3", "both.safetensors"])
    linears = files[1]
    found, both = (changes(opened(tiny, name), linears) for name in ("found", "both"))
    assert all(near(found[layer], both[layer], 0.02) for layer in both)  # stored in bfloat16


def test_diff_measures_the_distance(files, capsys):
    tiny, linears = files
    command.main(["diff", "a.safetensors", "b.safetensors"])
    *_, last = capsys.readouterr().out.splitlines()
    a, b = (changes(opened(tiny, name), linears) for name in "ab")
    apart = sum((a[layer] - b.get(layer, 0)).square().sum() for layer in a).sqrt().item()
    assert last.split()[-2] == f"{apart:.3g}"


@pytest.mark.parametrize(("words", "part"), [
    (["info", "nowhere.safetensors"], "is not there"),
    (["info", "base.safetensors"], "not understood"),
    (["resize", "a.safetensors", "c.safetensors"], "--rank or --energy"),
    (["merge", "c.safetensors"], "merge has one file"),
    (["merge", "a.safetensors", "nowhere/c.safetensors"], "folder that is not there"),
    (["extract", "base.safetensors", "base.safetensors", "c.safetensors", "--rank", "2"], "has the weights of"),
    (["extract", "base.safetensors", "a.safetensors", "c.safetensors", "--rank", "2"], "a LoRA"),
])
def test_mistakes_are_told_in_a_line_and_nothing_is_written(files, words, part):
    with pytest.raises(UserError, match=part):
        command.main(words)
    assert not Path("c.safetensors").exists()
