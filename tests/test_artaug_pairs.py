"""What ArtAug's pairs are judged by: figures, scorers, the filter, prompts."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_encoders import MANIFESTS, sized

from flux import checkpoint
from flux.artaug import judging, pairs, prompts, scorers, statistics
from flux.artaug.settings import Making
from flux.clip import AestheticHead, Clip
from flux.config import ClipTextConfig, ClipVisionConfig
from flux.errors import UserError
from golden import load
from vlm_client.critique import Edit, EditPlan


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Figures.

def test_the_interval_is_that_of_the_normal_law():
    gains = np.random.default_rng(0).normal(0.3, 1, 4000)
    mean, low, high = statistics.interval(gains)
    error = 1.96 * gains.std() / np.sqrt(4000)
    assert mean == pytest.approx(gains.mean()) and (low, high) == pytest.approx((mean - error, mean + error), abs=3e-3)
    assert statistics.interval([0.5] * 9) == (0.5, 0.5, 0.5)


def test_wins_and_their_interval():
    assert statistics.win_tie_lose([0.2, 0.05, 0, -0.04, -0.06, 3]) == (2, 3, 1)
    for hits, count in ((60, 100), (0, 12), (12, 12)):
        low, high = statistics.wilson(hits, count)
        for edge in {low, high} - {0.0, 1.0}:  # where the share is 1.96 deviations of that edge's law away
            assert abs(hits / count - edge) == pytest.approx(1.959964 * (edge * (1 - edge) / count) ** 0.5, abs=1e-9)


def test_diversity_is_of_seeds_not_of_prompts():
    seen = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), dim=1)
    assert judging.diversity(seen, 2) == 0 and judging.diversity(seen[[0, 2, 1, 3]], 2) == 1


# Scorers.

def small_clip(golden):
    sizes = golden.config
    return partial(Clip, sized(ClipTextConfig, sizes["text"], projection_dim=sizes["projection_dim"]),
                   sized(ClipVisionConfig, sizes["vision"], projection_dim=sizes["projection_dim"]))


def test_released_scorers_give_the_recorded_scores(tmp_path, monkeypatch):
    golden = load("clip_pair")
    clip = {name[5:]: value for name, value in golden.weights.items() if name.startswith("clip.")}
    head = {name[5:]: value for name, value in golden.weights.items() if name.startswith("head.")}
    old = {"text_model.embeddings.position_ids": torch.arange(4), "vision_model.embeddings.position_ids": torch.arange(4)}
    files = {"clip": tmp_path / "clip.safetensors", "pickscore": tmp_path / "pick.safetensors",
             "aesthetic": tmp_path / "head.safetensors"}
    checkpoint.save(files["clip"], clip | old)
    checkpoint.save(files["pickscore"], clip)
    checkpoint.save(files["aesthetic"], head)
    monkeypatch.setattr(scorers, "KINDS", {"clip": small_clip(golden), "pickscore": small_clip(golden),
                                           "aesthetic": partial(AestheticHead, (40, 64, 32, 16, 8, 1))})
    count = min(len(golden.inputs["pixels"]), len(golden.inputs["ids"]))
    monkeypatch.setattr(scorers, "ClipTokenizer", lambda path: lambda words, length: golden.inputs["ids"][:count])
    monkeypatch.setattr(scorers, "pixels", lambda pils, edge: golden.inputs["pixels"][:count])
    scorer = scorers.Released(files, tmp_path, torch.device("cpu"))
    rows, seen = scorer.of([None] * count, ["a"] * count)
    logits, scale = golden.outputs["logits"].diagonal()[:count], clip["logit_scale"].exp()
    for name, expected in (("aesthetic", golden.outputs["aesthetic"].flatten()[:count]), ("opinion", logits),
                           ("fidelity", logits / scale)):
        assert torch.allclose(torch.tensor([row[name] for row in rows]), expected, rtol=2e-5, atol=1e-5), name
    assert torch.allclose(seen.norm(dim=-1), torch.ones(count))
    checkpoint.save(files["clip"], {name: value for name, value in clip.items() if name != "logit_scale"})
    with pytest.raises(UserError, match="1 missing \\(logit_scale\\)"):
        scorers.load("clip", files["clip"])
    checkpoint.save(files["aesthetic"], head | {"layers.9.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="1 unexpected"):
        scorers.load("aesthetic", files["aesthetic"])


@pytest.mark.parametrize(("kind", "manifest"), [("clip", "clip_vit_l14"), ("pickscore", "clip_vit_h14_pickscore"),
                                                ("aesthetic", "laion_aesthetic_head")])
def test_their_tensors_are_those_of_the_released_files(kind, manifest):
    with torch.device("meta"):
        state = scorers.KINDS[kind]().state_dict()
    expected = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: shape for name, shape in expected.items() if not name.endswith("position_ids")}


def test_missing_scorers_are_named():
    with pytest.raises(UserError, match="--clip-weights, --aesthetic-weights came without a file"):
        scorers.Released({"pickscore": "x"}, None, "cpu")


def test_pixels_are_cut_from_the_middle_and_normalised():
    pil = Image.new("RGB", (300, 150), (255, 0, 0))
    pil.paste((0, 0, 255), (75, 0, 225, 150))
    found = scorers.pixels([pil], 50)
    blue = (torch.tensor([0.0, 0, 1]) - torch.tensor(scorers.PIXEL_MEAN)) / torch.tensor(scorers.PIXEL_STD)
    assert found.shape == (1, 3, 50, 50) and torch.allclose(found[0, :, 25, 25], blue, atol=1e-5)
    assert torch.allclose(found[0, :, 25, 5], blue, atol=1e-5), "the sides are cut off, not squeezed in"


def test_oklab_is_the_published_one():
    pil = Image.new("RGB", (2, 1))
    pil.putpixel((0, 0), (255, 255, 255))
    pil.putpixel((1, 0), (255, 0, 0))
    assert scorers.oklab(pil)[0] == pytest.approx(np.array([[1, 0, 0], [0.6280, 0.2249, 0.1258]]), abs=1e-3)


def test_demo_tastes_prefer_range_and_many_tones():
    flat, ramp = Image.new("RGB", (64, 64), (120, 120, 120)), Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    for taste in (scorers.palette, scorers.tones):
        assert taste(flat) == pytest.approx(1, abs=1e-6) and 5 < taste(ramp) <= 10


# The filter.

def row(number, aesthetic=(4.0, 5.0), fidelity=(0.3, 0.3), opinion=(1.0, 2.0), structure=0.9, change=0.5, edits=1):
    def side(i):
        return {"aesthetic": aesthetic[i], "fidelity": fidelity[i], "opinion": opinion[i]}
    plan = EditPlan((Edit((0, 0, 1, 1), "colour", "a b c"),) * edits, critic="nobody")
    return {"id": f"1-{number}", "plan": plan.as_dict(), "scores": {
        "before": side(0), "after": side(1), "structure": structure, "change": change}}


def judged(rows, **flags):
    usual = {"gain_percentile": 0.0, "floor_percentile": 0.0, "structure": (0.8, 0.985), "fidelity": -0.01}
    seen = F.normalize(random(len(rows), 8), dim=1)
    pairs.judge(rows, seen, Making(**(usual | flags)))
    return [" ".join(each["reasons"]) for each in rows], seen


@pytest.mark.parametrize(("changed", "why"), [
    ({"edits": 0}, "plan"), ({"aesthetic": (4.0, 4.2)}, "aesthetic gain 0.200 below 0.250"),
    ({"fidelity": (0.3, 0.28)}, "fidelity changed by -0.020"), ({"structure": 0.7}, "structure 0.700"),
    ({"structure": 0.99}, "structure 0.990"), ({"change": 0.04}, "change 0.040"),
    ({"opinion": (2.0, 2.0)}, "second opinion")])
def test_every_rule_refuses_and_says_why(changed, why):
    reasons, _ = judged([row(0), row(1, **changed)])
    assert reasons[0] == "" and why in reasons[1]


def test_percentiles_are_of_the_batch():
    rows = [row(i, aesthetic=(4.0, 4.5 + 0.1 * i)) for i in range(10)]
    reasons, _ = judged(rows, gain_percentile=70.0)
    assert [not words for words in reasons] == [False] * 7 + [True] * 3
    rows = [row(i, aesthetic=(1.0 * i, 1.0 * i + 1)) for i in range(10)]
    reasons, _ = judged(rows, floor_percentile=60.0)
    assert [not words for words in reasons] == [False] * 5 + [True] * 5


def test_what_is_kept_is_spread():
    rows = [row(i, aesthetic=(4.0, 5.0 + 0.01 * i)) for i in range(12)]
    reasons, seen = judged(rows, target=4)
    kept = [i for i, words in enumerate(reasons) if not words]
    assert len(kept) == 4 and 11 in kept, "the best is the first"
    chosen = pairs.k_center(list(range(12)), seen, 4)
    for i in range(1, 4):  # each is the farthest from those before it
        away = (1 - seen @ seen[chosen[:i]].T).min(1).values
        assert away[chosen[i]] == away.max()


def test_a_review_has_the_last_word(tmp_path):
    def decided():
        rows = [row(0) | {"decision": "accepted", "reasons": []}, row(1) | {"decision": "rejected", "reasons": ["x"]}]
        pairs.review(rows, tmp_path)
        return [each["decision"] for each in rows], rows
    assert decided()[0] == ["accepted", "rejected"]
    (tmp_path / "review.csv").write_text("id,decision,review\n1-0,accepted,reject\n1-1,rejected,accept\n")
    decisions, rows = decided()
    assert decisions == ["rejected", "accepted"] and rows[0]["reasons"] == ["review"] and rows[1]["reasons"] == []
    (tmp_path / "review.csv").write_text("id,decision,review\n1-0,accepted,perhaps\n")
    with pytest.raises(UserError, match="'perhaps', expected accept, reject or nothing"):
        decided()


# Prompts.

def test_no_prompt_is_used_twice_or_checked(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n" + "".join(f"a {i}\n" for i in range(40)) + "a 1  # again\n")
    settings = Making(prompts=path, count=18)
    used = [prompts.of_iteration(settings, i) for i in (1, 2)]
    checked = [caption.text for caption in prompts.for_checks(settings, 100)]
    assert len({*used[0], *used[1], *checked}) == 40 and len(checked) == 4
    with pytest.raises(UserError, match="expected 54 for iteration 3"):
        prompts.of_iteration(settings, 3)
    demo = [prompts.of_iteration(Making(count=30), i) for i in (1, 2)]
    held = [caption.text for caption in prompts.for_checks(Making(), 30)]
    assert len({*demo[0], *demo[1], *held}) == 90
