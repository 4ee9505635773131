"""What is expected to fit: counted right, chosen by the budget, and the same pictures in less memory."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
from flux import bench_plans, checkpoint, footprint, layers, memory, plan, storage, weights
from flux.adapters import Given
from flux.autoencoder import AutoEncoder
from flux.bench_plans import BenchPlans
from flux.clip import ClipText
from flux.config import DEMO, DEV, TINY, FluxConfig
from flux.errors import UserError
from flux.memory import Sizes
from flux.model import Flux
from flux.t5 import T5Encoder
from lora.adapter import Adapter, Dora, LowRank

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = replace(DEV, name="small", t5_length=256,
                flux=FluxConfig(hidden_size=768, num_heads=6, depth=2, depth_single_blocks=4))
WAYS = ("plain", "int8", "fp8", "streamed")


def layouts(model, dtype=torch.bfloat16) -> dict:
    """Of files as released, without their contents."""
    found = {}
    for part, (build, config) in {"flux": (Flux, model.flux), "ae": (AutoEncoder, model.autoencoder),
                                  "clip": (ClipText, model.clip), "t5": (T5Encoder, model.t5)}.items():
        with torch.device("meta"):
            network = build(config)
        kind = dtype if part == "flux" else bench_plans.RELEASED[part]
        found[part] = {name: tensor.to(kind) for name, tensor in network.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def dev() -> dict:
    return layouts(DEV)


# Counting.

def test_what_is_alive_at_once_is_counted():
    def work():
        a = torch.empty(100)                # 400 bytes
        b = a.view(10, 10).T                # none
        c = b + 1                           # 400
        del a, b
        c.mul_(2)
        return torch.cat((c, c, c)).sum()   # 1200 and 4
    assert footprint.peak(work) == 400 + 1200 + 4
    held = torch.empty(1000, device="meta")
    assert footprint.peak(lambda: held[:500].neg()) == 2000


def test_a_linear_layer_in_8_bits_is_counted_with_its_wide_weight():
    with torch.device("meta"):
        layer = storage.StoredLinear(nn.Linear(300, 200), torch.int8, torch.float32, torch.device("meta"))
        x = torch.empty(7, 300)
    assert footprint.peak(lambda: layer(x)) == 4 * (300 * 200 + 7 * 200)


def test_gelu_within_a_product_is_counted_where_it_is_computed(monkeypatch):
    """With AVX-512 an MLP holds its input once widened; elsewhere the product and its gelu, one beside the other."""
    with torch.device("meta"):
        mlp, x = layers.MLP(TINY), torch.empty(1, 7, TINY.hidden_size)
    wide, narrow = 4 * 7 * TINY.mlp_hidden, 4 * 7 * TINY.hidden_size
    apart = max(2 * wide, wide + narrow)
    for onednn, expected in ((True, wide + narrow), (False, apart)):
        monkeypatch.setattr("flux.linear.ONEDNN_IS_QUICKER", onednn)
        assert footprint.peak(lambda: mlp(x), "cpu") == expected
        assert footprint.peak(lambda: mlp(x)) == apart
    assert footprint.runs_on(x) == "meta", "and nothing of it stays"


def test_full_size_weights_by_hand(dev):
    """flux.md section 1: 11,901,408,320 numbers in all, 339,831,296 in a double block, 141,591,808 in a single one."""
    sizes = Sizes(512, 512)
    at = {way: plan.Plan(torch.bfloat16, way).counted(DEV, dev, sizes, GPU).parts for way in WAYS}
    assert at["plain"]["transformer"] == 2 * 11_901_408_320
    assert 11_901_408_320 < at["int8"]["transformer"] == at["fp8"]["transformer"] < 1.002 * 11_901_408_320
    few = 11_901_408_320 - 19 * 339_831_296 - 38 * 141_591_808
    assert 2 * few < at["streamed"]["transformer"] < 2.01 * few
    assert at["streamed"]["step"] > 2 * 2 * 339_800_000
    on_cpu = plan.Plan(torch.bfloat16).counted(DEV, dev, sizes, CPU).parts
    assert on_cpu["transformer"] == 0 and on_cpu["autoencoder"] > 0  # bf16 as in its file; float32 in its file
    assert plan.Plan(torch.float32).counted(DEV, dev, sizes, CPU).parts["autoencoder"] == 0


def test_the_stage_that_needs_most_is_the_peak(dev):
    one = plan.Plan(torch.bfloat16, "streamed").counted(DEV, dev, Sizes(512, 512), GPU)
    assert one.peak == max(one.stages.values()) == one.stages["text"] > 9e9  # T5-XXL
    cut = replace(one, stream_t5=True).counted(DEV, dev, Sizes(512, 512), GPU)
    assert cut.peak < 3.5e9
    larger = cut.counted(DEV, dev, Sizes(1024, 1024, 2), GPU)
    assert larger.parts["step"] > cut.parts["step"] and larger.parts["decode"] > 7 * cut.parts["decode"]


def test_loras_count_as_they_lie_beside_the_layers():
    low = LowRank(torch.randn(2, 30), torch.randn(90, 2))
    adapter = Adapter({"a": (low,), "b": (Dora(low, torch.rand(90)),)})
    given = [Given("1", Path("a"), 0.5, {"flux": adapter, "t5": adapter}), Given("2", Path("b"), 0.0, {"flux": adapter})]
    assert memory.factors(given, ("flux",), torch.bfloat16) == 2 * (240 + 240 + 90)
    assert memory.factors(given, ("clip", "t5"), torch.float32) == 4 * 570


# Choosing.

@pytest.mark.parametrize("place", [CPU, GPU])
def test_more_memory_is_never_a_worse_plan(dev, place, monkeypatch):
    monkeypatch.setattr(plan.device, "choose", lambda _, dtype: (place, plan.device.DTYPES.get(dtype, torch.bfloat16)))
    every = [one.counted(DEV, dev, Sizes(512, 512), place) for one in plan.candidates(place)]
    ranks = []
    for budget in np.geomspace(3, 60, 40):
        try:
            ranks.append(every.index(plan.choose(budget, every, [])))
            assert every[ranks[-1]].peak <= 1e9 * budget
        except UserError:
            assert not ranks and all(one.peak > 1e9 * budget for one in every)
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == 0 and len(set(ranks)) > 2


def test_a_budget_that_no_plan_meets_says_the_smallest(dev):
    every = [one.counted(DEV, dev, Sizes(512, 512), CPU) for one in plan.candidates(CPU)]
    smallest = min(every, key=lambda one: one.peak)
    with pytest.raises(UserError, match="--vram 0.1 GB.*leave out --store, or make --batch") as caught:
        plan.choose(0.1, every, ["--store"])
    said = str(caught.value)
    assert f"at least {plan.gb(smallest.peak)} ({smallest};" in said and "\n" not in said
    assert plan.choose(float(plan.gb(smallest.peak).split()[0]), every, []).peak == smallest.peak


def test_what_a_flag_settles_stays():
    def all_of(**settled):
        return list(plan.candidates(CPU, **settled))
    assert {one.way for one in all_of(store="fp8")} == {"fp8"}
    assert all(one.strips for one in all_of(in_strips=True))
    assert {one.dtype for one in all_of(dtype="bf16")} == {torch.bfloat16}
    assert {one.dtype for one in all_of()} == {torch.float32, torch.bfloat16} and all_of()[0] == plan.Plan(torch.float32)


# The command.

def draw(capsys, *words: str) -> tuple[np.ndarray, str]:
    sample.main(["a red circle", "--steps", "2", "--device", "cpu", *words])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    return np.asarray(Image.open(sorted(Path("out").glob("*.png"))[-1])).astype(int), said[0] if said else ""


def test_the_plan_is_told_and_the_picture_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain, said = draw(capsys)
    assert said == ""
    ample, said = draw(capsys, "--vram", "1")
    assert said.startswith("plan: fp32; at most 0.0") and "about" in said and np.array_equal(ample, plain)
    tight, said = draw(capsys, "--vram", "0.02")
    assert said.startswith("plan: fp32, streamed") and np.array_equal(tight, plain)
    kept, said = draw(capsys, "--vram", "1", "--store", "fp8", "--strips")
    assert said.startswith("plan: fp32, fp8, autoencoder in strips;") and 0 < abs(kept - plain).mean() < 3
    with pytest.raises(UserError, match="--vram 0.001 GB is too little.*leave out --store, or"):
        monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("weights were loaded"))
        draw(capsys, "--vram", "0.001", "--store", "int8")


# Measured, in another process: memory that this one's libraries keep would be taken for ours.

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell a process's anonymous memory")
def test_expected_memory_is_within_a_tenth_of_the_measured(tmp_path, monkeypatch):
    found = bench_plans.write(tmp_path, SMALL, ["flux"], sparse=True)
    names = ("fp32-streamed", "fp32-int8", "bf16-fp8")
    bench = BenchPlans(plan=names, stage=("steps",), width=256, height=256, device="cpu")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        def in_one_process(bench, model, found, row):
            """The greatest of up to four: a busy machine may look past a peak, and cannot see one that is not there."""
            measured = []
            while len(measured) < 4 and (not measured or max(measured) < 0.95 * row.expected):
                done = pool.submit(bench_plans.run, bench, model, found, row).result()
                measured.append(done.measured)
            return replace(done, measured=max(measured))
        monkeypatch.setattr(bench_plans, "in_fresh_process", in_one_process)
        rows = list(bench_plans.rows(bench, SMALL, found))
    assert len(rows) == 3
    for row in rows:
        assert abs(row.expected / row.measured - 1) < 0.1, row
        assert row.seconds > 0 and row.estimated > 0


def test_random_files_are_as_released_and_go_away(tmp_path, capsys):
    bench_plans.main(["--random", "--model", "demo", "--width", "64", "--height", "64", "--plan", "fp32-streamed",
                      "--stage", "steps", "--folder", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "random weights" in out and out.splitlines()[-1].startswith("steps     fp32, streamed")
    assert not list(tmp_path.iterdir())
    found = bench_plans.write(tmp_path, DEMO, ["flux"], sparse=False)
    empty = bench_plans.write(tmp_path / "..", DEMO, ["ae"], sparse=True)
    assert checkpoint.read(found["flux"].path)["img_in.weight"].float().std() > 0.01
    assert not checkpoint.read(empty["ae"].path)["decoder.conv_in.weight"].any()
    assert checkpoint.layout(checkpoint.read(found["flux"].path)).keys() == Flux(DEMO.flux).state_dict().keys()
