"""ArtAug's training: differential training on two latents, and the loop, cut off anywhere."""

import json
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import train
from flux import cache, conditioning, flow, latents, regions
from flux.artaug import differential, evaluate, lessons, pairs, report
from flux.artaug.settings import Learning
from flux.config import FluxConfig
from flux.errors import UserError
from flux.model import Flux
from lora import algebra, inject
from lora.adapter import Adapter, LowRank, delta
from lora.inject import Loras
from vlm_client import measuring
from vlm_client.critique import Edit, EditPlan


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Differential training.

def test_times_and_weights_are_the_published_ones():
    times = lessons.times()
    assert len(times) == 1000 and times[0] == 1 and times[-1] == pytest.approx(3 * 0.003 / 1.002 / (1 + 0.006 / 1.002))
    weights = lessons.weights_of(times)
    assert weights.mean() == pytest.approx(1, abs=1e-5) and weights.min() == 0 and times[weights.argmax()] == pytest.approx(
        0.5, abs=2e-3)
    assert (lessons.weights_of(times, "none") == 1).all()


def test_the_losses_are_zero_where_they_should_be():
    z, after, eps, sigma = random(2, 6, 64), random(2, 6, 64, seed=1), random(2, 6, 64, seed=2), torch.tensor([0.3, 0.8])
    assert lessons.loss(lambda x, t: eps - z, z, eps, sigma).abs().max() < 1e-10

    def base(x, t):
        return 0.3 * x
    moved = lessons.paired_loss(lambda x, t: base(x, t) + z - after, base, z, after, eps, sigma)
    assert moved.abs().max() < 1e-10 < 0.1 < lessons.paired_loss(base, base, z, after, eps, sigma).min()


def picture(seed, count=1):
    """(count, 16, 8, 8) latents, the same everywhere."""
    return random(count, 16, 1, 1, seed=seed).repeat(1, 1, 8, 8)


def by_heart(z):
    return lessons.Pictures(latents.pack(z), "none")


class Toy:
    """What a Student asks of an artist, on a model of width 64."""

    def __init__(self):
        torch.manual_seed(0)
        config = FluxConfig(vec_in_dim=24, context_in_dim=28, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1,
                            axes_dim=(8, 12, 12))
        self.transformer = Flux(config)
        self.loras, self.place, self.size, self.guidance = Loras(self.transformer), torch.device("cpu"), (64, 64), 3.5
        self.times, self.dtype = [1.0, 0.8, 0.5, 0.0], torch.float32
        optimiser = torch.optim.AdamW(self.transformer.parameters(), lr=2e-3)
        for step in range(150):  # a base that knows pictures of one token each, as a base should know the world
            z, eps = latents.pack(picture(1000 + step, 8)), random(8, 16, 64, seed=step)
            velocity = conditioning.velocity(self.transformer, self.condition("a" * 8))
            flow.loss(velocity, z, eps, torch.rand(8, generator=torch.Generator().manual_seed(step))).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        self.transformer.requires_grad_(False)

    def condition(self, said):
        txt, vec = (torch.cat([random(1, *shape, seed=ord(word[0]) - ord("a")) for word in said])
                    for shape in ((4, 28), (24,)))
        return conditioning.condition(txt, vec, 64, 64, 3.5)

    def velocity(self, said, plans, mode):
        return regions.velocity_of_each(lambda words: conditioning.velocity(self.transformer, self.condition(words)), said,
                                        plans, self.size)


@pytest.fixture(scope="module")
def taught():
    artist = Toy()
    state = {name: value.clone() for name, value in artist.transformer.state_dict().items()}
    settings = Learning(learn_steps=50, learn_batch=1, lr=3e-3, rank=8, weighting="none")
    before, after = picture(1), picture(2)
    student = differential.Student(artist, settings, ("toy",))
    anchor = student.learn("anchor", by_heart(before), ["a"])
    second = student.learn("difference", by_heart(after), ["a"], anchor.adapter)
    return artist, state, before, after, anchor, second


def test_the_second_lora_alone_moves_from_before_to_after(taught):
    """Acceptance 4 of the spec: the mean displacement of the one-step reconstruction points from z to z'."""
    artist, _, before, after, anchor, second = taught
    z, difference = latents.pack(before), (latents.pack(after) - latents.pack(before)).flatten()

    def reconstruction():
        found, velocity = [], conditioning.velocity(artist.transformer, artist.condition(["a"]))
        with torch.no_grad():
            for i, time in enumerate((0.9, 0.7, 0.5)):
                sigma = torch.tensor([time])
                noisy = flow.interpolate(z, random(*z.shape, seed=10 + i), sigma)
                found.append(noisy - time * velocity(noisy, sigma))
        return torch.stack(found).mean(0)

    plain, cosines = reconstruction(), {}
    for name, stage in (("anchor", anchor), ("difference", second)):
        artist.loras.attach("x", stage.adapter)
        cosines[name] = F.cosine_similarity((reconstruction() - plain).flatten(), difference, dim=0).item()
        artist.loras.detach("x")
    assert cosines["difference"] > 0.5 and cosines["anchor"] < 0.2, cosines


def test_the_second_stage_stands_on_the_anchor(taught):
    artist, _, before, _, anchor, _ = taught
    student = differential.Student(artist, Learning(learn_steps=1, rank=8), ("toy",))
    worn, bare = (student.learn("again", by_heart(before), ["a"], each).tests[0][1] for each in (anchor.adapter, None))
    assert worn == pytest.approx(anchor.tests[-1][1], rel=1e-4) and bare == pytest.approx(anchor.tests[0][1], rel=1e-4)


@pytest.fixture(scope="module")
def lesson(taught):
    """Four pairs with none, one, two regions, and another one."""
    plans = [EditPlan(tuple(Edit((0, 0, 1, 1) if word == "b" else (0, 0, 0.5, 1), "colour", word) for word in words))
             for words in ("", "b", "bc", "d")]
    rows = [{"prompt": "a", "plan": json.loads(json.dumps(plan.as_dict()))} for plan in plans]
    before, after = (latents.pack(picture(seed, 4)) for seed in (1, 2))
    return differential.regional(taught[0], Learning(region_scale=3.0), rows, before, after), plans


def test_each_pair_is_taught_by_its_own_plan(taught, lesson):
    img, t, some = random(4, 16, 64), torch.tensor([0.9, 0.5, 0.5, 0.5]), [2, 0, 1, 3]
    with torch.no_grad():
        together = lesson[0].taught(some)(img, t)
        for k, i in enumerate(some):
            areas = [regions.Region(edit.box, edit.prompt, 3.0) for edit in lesson[1][i].edits]
            alone = taught[0].velocity(["a"], [areas], "blend")(img[k:k + 1], t[k:k + 1])
            assert torch.allclose(together[k:k + 1], alone, atol=1e-5)
        plain = conditioning.velocity(taught[0].transformer, taught[0].condition("aaaa"))(img, t)
    changed = [(together[k] - plain[k]).abs().max().item() for k in range(4)]
    assert changed[1] < 1e-5 < 0.01 < min(changed[0], *changed[2:]), changed


def test_states_of_the_velocity_lie_between_both_pictures():
    seen = []

    def velocity(img, t):
        seen.append((img, t))
        return img
    lesson = lessons.Regional(torch.zeros(64, 4, 8), torch.ones(64, 4, 8), torch.tensor([0.0]), lambda some: velocity)
    assert lesson.losses(velocity, lambda v: v, list(range(64)), torch.Generator().manual_seed(0)).max() == 0
    share = seen[0][0][:, 0, 0]
    assert (seen[0][0] == share[:, None, None]).all() and 0 <= share.min() < 0.1 and 0.9 < share.max() <= 1
    lesson.times = torch.tensor([1.0, 0.8])
    lesson.losses(velocity, lambda v: v, list(range(64)), torch.Generator().manual_seed(0))
    assert set(seen[-1][1].tolist()) == set(lesson.times.tolist())


def test_the_velocity_of_regions_is_learned(taught, lesson):
    artist, lesson = taught[0], lesson[0]
    settings = Learning(learn_steps=50, learn_batch=4, lr=5e-3, rank=8)
    stage = differential.Student(artist, settings, ("toy",)).learn("difference", lesson, ["a"] * 4)
    assert stage.tests[0][1] == pytest.approx(1, abs=1e-4) and stage.tests[-1][1] < 0.6, stage.tests
    assert len(stage.losses) == 50 and not stage.end
    with inject.training(artist.transformer, "blocks", 8) as made, torch.no_grad():
        for pair in made.values():
            pair.B.fill_(0.02)
        velocity = conditioning.velocity(artist.transformer, artist.condition("aaa"))
        without = partial(differential.switched_off, made)

        def losses(v):
            return lesson.losses(v, without, [0, 1, 2], torch.Generator().manual_seed(0))
        assert losses(without(lesson.taught([0, 1, 2]))).max() == 0 < 1e-4 < losses(lesson.taught([0, 1, 2])).min()
        assert losses(without(velocity))[0] < 1e-9, "where no region is, the base is right"


def test_learning_leaves_the_model_as_it_was(taught):
    artist, state, *_, second = taught
    now = artist.transformer.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())
    assert not any(p.requires_grad for p in artist.transformer.parameters()) and not artist.loras.on
    assert len(second.losses) <= 50 and second.tests[0][0] == 0 and second.tests[-1][1] < 0.8 * second.tests[0][1]


def test_a_trained_lora_goes_and_given_ones_stay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    given = Adapter({"0": (LowRank(random(1, 4), random(4, 1, seed=1)),)})
    loras, x = Loras(model), random(2, 4)
    loras.attach("given", given)
    before = model(x)
    with inject.training(model, "0|1", 2) as made:
        assert made.keys() == {"0", "1"} and torch.equal(model(x), before)
        made["1"].B.data.fill_(1)
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before) and isinstance(model[1], torch.nn.Linear)
    loras.detach("given")
    assert isinstance(model[0], torch.nn.Linear)


def test_when_a_stage_ends():
    ends = by_heart(picture(1)).ends
    assert ends([0.1]) == "" and ends([0.5, 0.14]).startswith("known by heart")
    assert ends([0.9, 0.8, 0.79, 0.795]) == "" and ends([0.9, 0.8, 0.79, 0.795, 0.8]).startswith("no better")
    assert ends([0.9, 0.8, 0.79, 0.795, 0.7]) == ""


@pytest.mark.parametrize(("grouping", "sizes"), [("groups", [8, 8, 4]), ("per_pair", [1] * 20), ("joint", [20])])
def test_groups(grouping, sizes):
    assert [len(part) for part in differential.groups(20, Learning(grouping=grouping))] == sizes


def test_the_average_is_the_mean_of_the_changes():
    some = [Adapter({"a": (LowRank(random(2, 6, seed=i), random(5, 2, seed=10 + i), 0.5 + i),)}) for i in range(3)]
    mean = sum(delta(each.layers["a"], (5, 6), torch.zeros(5, 6)) for each in some) / 3
    whole, kept = differential.average(some, 6)
    assert torch.allclose(delta(whole.layers["a"], (5, 6), torch.zeros(5, 6)), mean, atol=1e-5) and kept == pytest.approx(1)
    small, kept = differential.average(some, 2)
    U, S, V = torch.linalg.svd(mean)
    assert torch.allclose(delta(small.layers["a"], (5, 6), torch.zeros(5, 6)), U[:, :2] * S[:2] @ V[:2], atol=1e-4)
    assert kept == pytest.approx((S[:2].square().sum() / S.square().sum()).item(), abs=1e-5)
    assert algebra.averaged(some).layers["a"][0].scale == pytest.approx(0.5 / 3)


# The loop.

@pytest.fixture
def url():
    with measuring.serve(0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def hashes(run):
    names = ("iteration-1/manifest.jsonl", "iteration-1/lora.safetensors", "artaug.safetensors")
    return [cache.content(run / name) for name in names]


def test_the_loop_from_prompts_to_a_lora_and_again_from_any_cut(url, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "PART", 3)
    monkeypatch.setattr(lessons, "TEST_NOISES", 1)
    monkeypatch.setattr(lessons, "TEST_TIMES", (0.7,))
    monkeypatch.setattr("flux.artaug.loop.exhausted", lambda rows: "")  # two steps draw nothing worth a critic's word
    run = tmp_path / "artaug"
    words = ["--vlm", url, "--count", "5", "--steps", "2", "--guidance", "2", "--seed", "3", "--out", str(tmp_path),
             "--gain", "-9", "--gain-percentile", "0", "--floor-percentile", "0", "--structure", "-1", "--structure", "2",
             "--fidelity", "-9", "--change", "0", "--rank", "2", "--grouping", "groups", "--group", "3",
             "--learn-steps", "1", "--device", "cpu"]
    loop = ["artaug", *words, "--iterations", "1", "--checks", "2", "--fall", "2"]
    train.main(loop)
    out = capsys.readouterr().out
    assert "passes for 1 x 5 pairs" in out and "critic" in out and "measuring-critic-2" in out
    first, asked = hashes(run), (run / "critic" / "ledger.jsonl").read_text()
    rows = [json.loads(line) for line in (run / "iteration-1" / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all({"plan", "seed", "sha256", "scores", "reasons", "critic", "model"} <= each.keys()
                                  for each in rows)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 and "src=\"http" not in page and "href" not in page
    for lost in ("part-0001.json", "part-0000.safetensors", "manifest.jsonl", "groups/group-000.safetensors",
                 "lora.safetensors", "check.json", "../artaug.safetensors"):
        (run / "iteration-1" / lost).unlink(missing_ok=True)
    train.main(loop)
    assert hashes(run) == first and (run / "critic" / "ledger.jsonl").read_text() == asked, "no question is asked twice"
    words += [word for way in (*evaluate.WAYS, "plain", "two_stage", "paired_noise") for word in ("--compare", way)]
    train.main(["artaug", "evaluate", *words, "--held", "3", "--varied", "1", "--strengths", "1", "--strengths", "0"])
    told = json.loads((run / "evaluate.json").read_text())["figures"]
    assert told.keys() == {"base", "rewrite", "regions", "plain", "two_stage", "paired_noise", "artaug", "artaug 0"}
    assert told["artaug 0"]["against base"]["gain"] == [0, 0, 0] and told["artaug 0"]["against base"]["wins"] == [0, 3, 0]
    assert "| artaug |" in (run / "evaluate.md").read_text()
    for method in ("velocity", "plain"):  # in bfloat16, as on a GPU
        train.main(["artaug", "learn", *words[:words.index("--compare")], "--dtype", "bf16", "--method", method])
        assert hashes(run)[1] != first[1]


def test_evaluate_wants_a_loop_first(tmp_path):
    with pytest.raises(UserError, match=r"artaug.safetensors is not there"):
        evaluate.Evaluate(out=tmp_path, vlm="http://localhost:1").run()
    with pytest.raises(UserError, match="--compare magic: expected some of rewrite, regions, velocity, two_stage"):
        evaluate.Evaluate(out=tmp_path, compare=("plain", "magic")).run()


def test_training_wants_a_critic(tmp_path):
    with pytest.raises(UserError, match="--vlm is missing"):
        train.main(["artaug", "--out", str(tmp_path)])


def test_reasons_are_counted_by_their_rule():
    assert [report.word(words) for words in ("plan: no valid edit", "aesthetic gain -0.20 below 0.25", "change 0.04 below",
                                             "second opinion 0.1, not above 0", "review", "known by heart: error 0.1")] == [
        "plan", "aesthetic gain", "change", "second opinion", "review", "known by heart"]
