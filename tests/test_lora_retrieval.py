"""The index of a pool and what is found in it: exactness against plain float32, and every way a file can be wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux import checkpoint
from flux.errors import UserError
from lora import index, retrieval
from lora.index import Calibration, Index
from lora.retrieval import query

WIDTH = 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def put(file: Path, text: str) -> Path:
    """A stand-in for a LoRA, whose embedding follows from its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


class Embed:
    """Counts its calls; texts that begin with `broken` are refused."""

    def __init__(self):
        self.seen = []

    def __call__(self, file: Path) -> tuple[Tensor, dict]:
        self.seen.append(file.name)
        text = file.read_text()
        if text.startswith("broken"):
            raise UserError(f"{file.name} is broken; expected a LoRA")
        return vector_of(text), {"ranks": [4]}


def vector_of(text: str) -> Tensor:
    if text == "nothing":
        return torch.zeros(WIDTH)
    if text == "endless":
        return torch.full((WIDTH,), float("nan"))
    return draw(WIDTH, seed=sum(text.encode())) * 3


@pytest.fixture
def pool(tmp_path) -> Path:
    for i in range(12):
        put(tmp_path / "pool" / f"{i:02d}.safetensors", f"lora {i}")
    return tmp_path / "pool"


def made(pool: Path, **options) -> tuple[Index, index.Report, Embed]:
    embed = Embed()
    return *index.build(pool.parent / "pool.index", pool, embed, "abc", **options), embed


def vectors(n: int, d: int = WIDTH, clusters: int = 0) -> Tensor:
    """Unit vectors; in clusters so tight that int8 cannot tell their members apart."""
    x = draw(n, d, seed=1)
    if clusters:
        x = draw(clusters, d, seed=2)[torch.arange(n) % clusters] + 0.003 * x
    return (x / x.norm(dim=1, keepdim=True)).half()


def synthetic(path: Path, x: Tensor, kinds=("a", "b")) -> Index:
    rows = [{"id": f"n{i}", "file": f"n{i}.safetensors", "sha256": f"{i:064x}", "also": [], "kind": kinds[i % len(kinds)]}
            for i in range(len(x))]
    index.write(path, x, rows, "abc", path.parent, None)
    return Index(path)


# --- search ---

@pytest.mark.parametrize("clusters", (0, 3))
@pytest.mark.parametrize("count", (1, 3, 40, 500, 10_000))
def test_the_nearest_are_exactly_those(tmp_path, monkeypatch, clusters, count):
    monkeypatch.setattr(retrieval, "TOGETHER", 5)  # so that there are several calls, and a smaller last one
    monkeypatch.setattr(retrieval, "FIRST", 16)
    x = vectors(3000, clusters=clusters)
    found = synthetic(tmp_path / "i", x)
    for seed in range(4):
        q = draw(WIDTH, seed=100 + seed)
        q = q / q.norm()
        expected, _ = (x.float() @ q).topk(min(count, 3000))
        rows, similarities = retrieval.nearest(found, q, count)
        assert torch.allclose(similarities, expected, atol=1e-6)
        assert torch.allclose(x[rows].float() @ q, expected, atol=1e-6) and len(set(rows.tolist())) == len(rows)


@pytest.mark.parametrize("width", (1, 7, WIDTH, 768))
@pytest.mark.parametrize("count", (1, 95, 96, 97, 2000))
def test_the_coarse_error_is_within_its_bound(tmp_path, count, width):
    x = vectors(count, width)
    found = synthetic(tmp_path / "i", x)
    for seed in range(20):
        q = retrieval.checked(found, draw(width, seed=seed))
        rough, bound = retrieval.roughly(found, q)
        wrong = (rough - x.float() @ q).abs().max()
        assert wrong <= bound and (count < 2000 or width < WIDTH or wrong > 0.04 * bound)


@pytest.mark.parametrize("count", (1, 96, 250))
def test_the_coarse_copy_is_the_rounded_vectors(count):
    x = vectors(count)
    coarse, scale, worst = index.quantised(x)
    columns = coarse[:, :, :index.LANES].transpose(1, 2).flatten(0, 1)  # a row for each LoRA, and some for none
    rounded = (columns[:count].float() - 128) * scale[:, None]
    assert (rounded - x.float()).norm(dim=1).max().item() == pytest.approx(worst, rel=1e-3)
    assert worst < 127 ** -1 * WIDTH ** 0.5 / 2 and (columns[count:] == 128).all()
    assert (coarse[:, :, index.LANES:].contiguous().view(torch.float32) == torch.tensor([1.0, -128.0])).all()


def test_kinds_and_exclusions(tmp_path):
    x = vectors(300)
    found = synthetic(tmp_path / "i", x, ("style", "object", ""))
    for i in range(300):
        put(tmp_path / f"n{i}.safetensors", "")
    q = draw(WIDTH, seed=9)
    plain = [hit.id for hit in query(found, q, 300, diversity=0).hits]
    assert len(plain) == 300
    styles = [name for name in plain if int(name[1:]) % 3 == 0]
    assert [hit.id for hit in query(found, q, 300, kinds=["style"], diversity=0).hits] == styles
    out = [plain[0], f"{int(plain[2][1:]):064x}"]  # by id and by hash
    assert [hit.id for hit in query(found, q, 3, exclude=out, diversity=0).hits] == [plain[1], plain[3], plain[4]]
    assert [hit.id for hit in query(found, q, 2, kinds=["style"], exclude=styles[:1], diversity=0).hits] == styles[1:3]
    with pytest.raises(UserError, match="no LoRA is of kind 'styles'; expected of"):
        query(found, q, kinds=["styles"])


def test_diversity_takes_one_of_three_copies(tmp_path):
    q = torch.eye(WIDTH)[0]
    near = torch.stack([0.9 * q + 0.43 * torch.eye(WIDTH)[1] + 0.001 * draw(WIDTH, seed=i) for i in range(3)])
    other = (0.85 * q + 0.53 * torch.eye(WIDTH)[2])[None]
    x = torch.nn.functional.normalize(torch.cat((near, other, vectors(50).float())), dim=1).half()
    found = synthetic(tmp_path / "i", x)
    for i in range(len(x)):
        put(tmp_path / f"n{i}.safetensors", "")
    assert {hit.id for hit in query(found, q, 3, diversity=0).hits} == {"n0", "n1", "n2"}
    hits = query(found, q, 2).hits
    assert hits[1].id == "n3" and hits[0].id in ("n0", "n1", "n2")
    assert hits[0].similarity == pytest.approx((x.float() @ q).max().item(), abs=1e-6)


def test_more_than_there_are_gives_all(pool):
    found, _, _ = made(pool)
    answer = query(found, draw(WIDTH), 50)
    assert len(answer.hits) == 12 and len({hit.id for hit in answer.hits}) == 12 and not answer.gone


def test_below_the_least_similarity_there_is_silence(pool):
    found, _, _ = made(pool, calibration=Calibration(0.6, 10.0, -5.0))
    q = vector_of("lora 3")
    (hit,) = query(found, q).hits
    assert hit.id == "03" and hit.probability == pytest.approx(1 / (1 + 2.718281828 ** -5), rel=1e-3)
    assert query(found, -q).hits == ()
    assert len(query(found, -q, 3, min_sim=-1).hits) == 3
    assert not query(found, q, min_sim=1.01).hits


def test_wrong_queries_are_said(pool):
    found, _, _ = made(pool)
    for vector in (torch.zeros(WIDTH), torch.full((WIDTH,), float("nan")), torch.ones(WIDTH + 1)):
        with pytest.raises(UserError, match="embed it again"):
            query(found, vector)
    for options in ({"k": 0}, {"diversity": 1.5}):
        with pytest.raises(UserError, match="change them"):
            query(found, draw(WIDTH), **options)


def test_files_deleted_since_are_passed_over(pool):
    found, _, _ = made(pool)
    order = [hit.id for hit in query(found, draw(WIDTH), 12, diversity=0).hits]
    for name in order[:4]:
        (pool / f"{name}.safetensors").unlink()
    answer = query(found, draw(WIDTH), 3, diversity=0)
    assert [hit.id for hit in answer.hits] == order[4:7] and list(answer.gone) == order[:4]


def test_calibration_finds_the_threshold_and_the_curve():
    g = torch.Generator().manual_seed(0)
    similarity = torch.rand(4000, generator=g)
    right = torch.rand(4000, generator=g) < torch.sigmoid(12 * similarity - 6)
    found = retrieval.calibrate(similarity, right, 0.95)
    assert right[similarity >= found.min_sim].float().mean() >= 0.95
    lower = similarity >= found.min_sim - 0.02
    assert right[lower].float().mean() < 0.95
    assert found.slope == pytest.approx(12, rel=0.1) and found.offset == pytest.approx(-6, rel=0.1)
    apart = retrieval.calibrate(torch.arange(20.0), torch.arange(20) >= 10)  # finite though nothing overlaps
    assert apart.min_sim == 10 and 0 < apart.slope < 100
    backwards = retrieval.calibrate(torch.arange(20.0), torch.arange(20) < 10)
    assert backwards.min_sim > 19
    with pytest.raises(UserError, match="expected at least 10"):
        retrieval.calibrate(torch.rand(30), torch.ones(30))


# --- building ---

def test_only_what_is_new_is_embedded(pool):
    found, report, embed = made(pool)
    assert len(found) == 12 and len(report.added) == 12 and len(embed.seen) == 12
    assert found.row(3)["ranks"] == [4] and found.row(3)["id"] == "03"
    before = found.vectors.clone()
    put(pool / "new.safetensors", "something new")
    put(pool / "deeper" / "one.safetensors", "something else")
    put(pool / "05.safetensors", "changed")
    os.utime(pool / "06.safetensors")  # touched, not changed
    (pool / "07.safetensors").rename(pool / "renamed.safetensors")
    (pool / "08.safetensors").unlink()
    again, report, embed = made(pool)
    assert sorted(embed.seen) == ["05.safetensors", "new.safetensors", "one.safetensors"]
    assert report.removed == ["07.safetensors", "08.safetensors"] and len(again) == 13
    assert report.added == ["05.safetensors", "deeper/one.safetensors", "new.safetensors", "renamed.safetensors"]
    ids = {row["id"]: i for i, row in enumerate(again.rows)}
    assert torch.equal(again.vectors[ids["03"]], before[3]) and torch.equal(again.vectors[ids["renamed"]], before[7])
    assert not torch.equal(again.vectors[ids["05"]], before[5])
    whole, _, _ = made(pool, fresh=True)
    assert torch.equal(whole.vectors, again.vectors) and whole.rows == again.rows


def test_add_and_remove(pool):
    made(pool)
    path, embed = pool.parent / "pool.index", Embed()
    (pool / "02.safetensors").unlink()  # nobody looks
    found, report = index.add(path, [put(pool / "x.safetensors", "x")], embed, {"x.safetensors": {"kind": "style"}})
    assert embed.seen == ["x.safetensors"] and report.added == ["x.safetensors"] and len(found) == 13
    assert found.rows[-1]["kind"] == "style" and found.kinds == ["", "style"]
    assert {row["id"] for row in index.remove(path, ["02", "x"]).rows} == {f"{i:02d}" for i in range(12)} - {"02"}
    assert len(Index(path)) == 11
    with pytest.raises(UserError, match="expected ids in it"):
        index.remove(path, ["02"])
    with pytest.raises(UserError, match="would be empty"):
        index.remove(path, [row["id"] for row in Index(path).rows])
    with pytest.raises(UserError, match="is no file in"):
        index.add(path, [put(pool.parent / "y.safetensors", "y")], embed)


def test_equal_files_have_one_row(pool):
    put(pool / "copy.safetensors", "lora 4")
    put(pool / "another.safetensors", "lora 4")
    found, report, embed = made(pool)
    assert len(found) == 12 and len(embed.seen) == 12
    assert report.duplicates == {"another.safetensors": "04.safetensors", "copy.safetensors": "04.safetensors"}
    assert found.row(4)["also"] == ["another.safetensors", "copy.safetensors"]
    (pool / "04.safetensors").unlink()  # another stands for both now
    found, report, embed = made(pool)
    assert not embed.seen and len(found) == 12 and report.removed == ["04.safetensors"]
    assert report.duplicates == {"copy.safetensors": "another.safetensors"}


def test_files_that_are_no_loras_are_counted(pool):
    put(pool / "bad.safetensors", "broken")
    put(pool / "zero.safetensors", "nothing")
    put(pool / "nan.safetensors", "endless")
    found, report, _ = made(pool)
    assert len(found) == 12 and set(report.refused) == {"bad.safetensors", "zero.safetensors", "nan.safetensors"}
    assert "norm 0" in report.refused["zero.safetensors"] and "nan" in report.refused["nan.safetensors"]


def test_empty_folders_are_said(tmp_path):
    for folder, why in ((tmp_path / "none", "is no folder"), (tmp_path, "has no safetensors file")):
        with pytest.raises(UserError, match=why):
            index.build(tmp_path / "i.safetensors", folder, Embed(), "abc")
    put(tmp_path / "only.safetensors", "broken")
    with pytest.raises(UserError, match="none of the 1 files"):
        index.build(tmp_path / "i.safetensors", tmp_path, Embed(), "abc")
    assert not (tmp_path / "i.safetensors").exists()


def test_an_index_inside_its_folder_is_no_lora(pool):
    for _ in range(2):
        found, report = index.build(pool / "index.safetensors", pool, Embed(), "abc")
        assert len(found) == 12 and not report.refused
    assert [json.loads(line) for line in (pool / "index.jsonl").read_text().splitlines()] == found.rows
    moved = pool.rename(pool.with_name("elsewhere"))  # the index goes with it
    assert query(Index(moved / "index.safetensors"), draw(WIDTH)).hits[0].file.parent.resolve() == moved.resolve()


# --- files that are wrong ---

def test_an_index_of_another_encoder_is_refused(pool):
    made(pool)
    with pytest.raises(UserError, match="was made by encoder abc, this one is xyz"):
        Index(pool.parent / "pool.index", "xyz")
    with pytest.raises(UserError, match="build it anew"):
        index.build(pool.parent / "pool.index", pool, Embed(), "xyz")
    found, report = index.build(pool.parent / "pool.index", pool, Embed(), "xyz", fresh=True)
    assert found.encoder == "xyz" and len(report.added) == 12


def test_truncated_at_any_length_it_is_one_line(pool):
    made(pool)
    path = pool.parent / "pool.index"
    data = path.read_bytes()
    for length in {*range(0, len(data), 97), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as error:
            Index(path)
        assert "\n" not in str(error.value)


def test_other_files_and_broken_tables_are_refused(pool, tmp_path):
    made(pool)
    path = pool.parent / "pool.index"
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read(path).items()}
    head = {index.HEADER: checkpoint.read_header(path).metadata[index.HEADER]}
    checkpoint.save(tmp_path / "w", {"a": torch.ones(2)})
    with pytest.raises(UserError, match="is no index of LoRAs"):
        Index(tmp_path / "w")
    for name, value in (("vectors", tensors["vectors"].float()), ("vectors", torch.tensor(1.0)),
                        ("coarse", tensors["coarse"][:, :5]), ("offsets", tensors["offsets"].flip(0)),
                        ("offsets", tensors["offsets"] + 1), ("keys", tensors["keys"][:, :1]),
                        ("scale", tensors["scale"][1:])):
        checkpoint.save(tmp_path / "w", tensors | {name: value}, head)
        with pytest.raises(UserError, match="is a broken index"):
            Index(tmp_path / "w")
    for line in (b"{not JSON", json.dumps({"id": "x", "file": "../x"}).encode(), b"[1]", b'{"id": 3, "file": "x"}'):
        bad = tensors["lines"].clone()
        start, stop = tensors["offsets"][:2].tolist()
        bad[start:stop] = torch.tensor(list(line.ljust(stop - start)), dtype=torch.uint8)
        checkpoint.save(tmp_path / "w", tensors | {"lines": bad}, head)
        with pytest.raises(UserError, match="broken line for LoRA 0"):
            Index(tmp_path / "w").row(0)
    for head in ({index.HEADER: "{"}, {index.HEADER: "[]"}, {index.HEADER: '{"encoder": 3}'}):
        checkpoint.save(tmp_path / "w", tensors, head)
        with pytest.raises(UserError, match="is no index of LoRAs"):
            Index(tmp_path / "w")


def test_a_build_that_dies_leaves_the_old_index(pool, monkeypatch):
    found, _, _ = made(pool)
    put(pool / "new.safetensors", "new")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made(pool)
    assert len(Index(pool.parent / "pool.index")) == 12
    assert {file.name for file in pool.parent.iterdir()} == {"pool", "pool.index", "pool.jsonl"}
