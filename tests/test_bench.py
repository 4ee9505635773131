"""The benchmark at toy sizes: what it reports, not how fast it was."""

import math
from dataclasses import replace

import pytest
import torch

from flux import bench, device
from flux.errors import UserError
from lora import bench as lora_bench

TOY = bench.Bench(repeats=2, memory=False, hidden=128, depth=1, single=1, image_tokens=40, text_tokens=8, clip_width=64,
                  clip_layers=1, t5_width=64, t5_layers=1, ae_width=32, latent=2, device="cpu")
FORMULATION = replace(TOY, part=("transformer", "backward"), against=("formulation",))


def test_rows_compare_outputs_and_times():
    rows = list(bench.measure(replace(FORMULATION, dtype=("fp32", "bf16"))))
    kinds = [(row.part, row.dtype, row.against) for row in rows]
    assert kinds == [(part, dtype, "formulation") for part in FORMULATION.part for dtype in ("fp32", "bf16")]
    for row in rows:
        assert row.error < (1e-5 if row.dtype == "fp32" else 0.1), row
        assert len(row.ratios) == TOY.repeats and min(row.ratios) <= row.ratio <= max(row.ratios), row
        assert row.ours > 0 and row.theirs > 0, row


def test_a_wrong_contender_shows_in_the_error(monkeypatch):
    monkeypatch.setattr(bench, "_turn", lambda x, pe: x)
    assert all(row.error > 1e-3 for row in bench.measure(FORMULATION))


def test_without_the_libraries_every_part_is_timed_alone(monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda who: False)
    rows = list(bench.measure(TOY))
    assert [row.part for row in rows] == list(bench.WORK)
    assert all(row.ours > 0 and row.against is None and row.ratio is None and row.error is None for row in rows)


@pytest.mark.parametrize("library", ("diffusers", "transformers"))
def test_equals_the_library(library):
    pytest.importorskip(library)
    parts = tuple(part for part, (_, others) in bench.WORK.items() if library in others)
    rows = list(bench.measure(replace(TOY, part=parts, against=(library,))))
    assert [(row.part, row.against) for row in rows] == [(part, library) for part in parts]
    assert all(row.error < 1e-5 for row in rows), rows


def test_the_peak_of_a_call_is_counted():
    """In a fresh process: at least the 3D + 4D channels of a single block, and far from all the memory of the process."""
    place, dtype = device.choose("cpu", "fp32")
    sizes = replace(TOY, image_tokens=2000)
    peak = bench.peak_in_fresh_process(sizes, "transformer", "minflux", place, dtype)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    channels = 7 * sizes.hidden
    assert 1 < peak / (4 * (sizes.image_tokens + sizes.text_tokens) * channels) < 10


def test_the_command_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda who: False)
    bench.main(["--part=clip", "--device=cpu", "--clip-width=64", "--clip-layers=1", "--repeats=1", "--no-memory"])
    out = capsys.readouterr().out
    assert torch.__version__ in out and "CLIP 64 x 1" in out and "not installed, so not compared: diffusers, transf" in out
    head, row = out.splitlines()[-2:]
    assert head.split()[:3] == ["part", "dtype", "against"] and row.split()[:3] == ["clip", "fp32", "-"]
    assert math.isfinite(float(row.split()[4]))


@pytest.mark.parametrize("words, said", (("--hiden 128", "unknown flag --hiden, nearest is --hidden"),
                                         ("--hidden 100", "--hidden came as 100, expected a positive multiple of 128"),
                                         ("--repeats 0", "--repeats came as 0"), ("--part text", "expected one of transfo"),
                                         ("--against transformers", "--against transformers is not installed")))
def test_mistakes_are_told_before_anything_runs(words, said, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda who: False)
    with pytest.raises(UserError, match=said):
        bench.main(words.split())


def test_what_loras_cost_is_measured_at_toy_sizes(monkeypatch, capsys):
    """Gates equal their definition; every part of `python -m lora.bench` that takes sizes has its rows."""
    monkeypatch.setitem(lora_bench.SIZES, "small", TOY)
    lora_bench.main(["--part", "run-time", "--part", "gated", "--part", "step", "--rounds", "1", "--rank", "2"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1].split(",")[0].strip(" |") for row in rows] == ["merged", "merged", "no LoRA", "gates as defined", "kept"]
    assert all(float(row[4].strip(" |")) < 1e-5 for row in rows if row[4].strip(" |") != "-")
