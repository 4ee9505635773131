"""From a pool of files to an answer, by the commands: train a few steps, index, find; and the mistakes on the way."""

import json
from pathlib import Path

import pytest
import torch

import train
from flux import checkpoint, lora_layers, lora_names, lora_search, retriever
from flux.config import DEMO
from flux.errors import UserError
from lora import index, io
from lora.adapter import Adapter, LowRank


def lora(seed: int) -> Adapter:
    g, some = torch.Generator().manual_seed(seed), lora_layers.layers(DEMO.flux)[24:27]
    return Adapter({layer.name: (LowRank(torch.randn(2, layer.inputs, generator=g) / 14,
                                         torch.randn(layer.rows, 2, generator=g) * 0.02),) for layer in some})


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """16 LoRAs of random factors; one has no file any more."""
    folder, rows = tmp_path_factory.mktemp("pool"), {}
    names = lora_names.names(DEMO)
    for i in range(17):
        name = f"member-{i}"
        if i < 16:
            io.write(folder / f"{name}.safetensors", {"flux": lora(i)}, names)
        rows[name] = {"captions": {"long": f"a circle number {i}", "short": f"circle {i}"}, "held_out": i % 4 == 0,
                      "kind": ("style", "object")[i % 2]}
    (folder / "index.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:  # every third for validation, as an eighth of so few calibrates nothing
        patch.setattr(retriever, "kept_apart", lambda member: int(member.name.split("-")[1]) % 3 == 1)
        train.main(["autolora", "retriever", "--pool", str(pool), "--steps", "3", "--batch", "4", "--validate-every", "2",
                    "--out", str(out)])
    return out / "autolora-retriever" / "final.safetensors"


def test_train_index_and_find(pool, trained, capsys):
    figures = json.loads((trained.parent / "figures.json").read_text())
    assert {row["loras"] for row in figures.values()} == {4, 16}
    lora_search.main(["index", str(pool), "--encoder", str(trained)])
    assert "16 LoRAs; 16 new, 0 as before, 0 gone, 0 copies, 0 refused" in capsys.readouterr().out
    (pool / "text.safetensors").write_text("no LoRA")
    lora_search.main(["index", str(pool), "--encoder", str(trained)])
    said = capsys.readouterr().out
    assert "0 new, 16 as before" in said and "1 refused" in said and "refused: text.safetensors" in said
    (pool / "text.safetensors").unlink()
    found = index.Index(pool / "index.safetensors")
    assert found.row(0)["captions"]["short"] == "circle 0" and found.row(0)["ranks"] == {"2": 3}
    dense = sum((terms[0].dense() ** 2).sum().item() for terms in lora(0).layers.values()) ** 0.5
    assert found.row(0)["norm"] == pytest.approx(dense, rel=1e-3)
    find = ["find", "circle 3", "--index", str(pool / "index.safetensors"), "--encoder", str(trained)]
    lora_search.main([*find, "--min-sim", "-1", "-k", "5", "--kind", "style"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(int(line.split("member-")[1].split(".")[0]) % 2 == 0 for line in lines)
    lora_search.main([*find, "--min-sim", "1"])
    assert capsys.readouterr().out.startswith(f"no LoRA is near enough; the nearest, {pool}/member-")


def test_batches_are_drawn_by_name_and_hold_no_lora_twice(pool):
    task = retriever.TrainRetriever(pool=pool, batch=6, captions=2).task()
    assert not {task.members[i].name for i in task.train} & {"member-0", "member-4", "member-8", "member-12"}
    first, again, other = (task.batch(step, 0) for step in (1, 1, 2))
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert torch.equal(task.loss(first), task.loss(task.batch(1, 0)))
    assert len(first[0]) == 6 and first[2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_long_captions_are_read_to_their_end():
    words = lora_search.Words(DEMO)
    long = "a large red circle on a blue background, " * 30
    assert len(words.pieces(long)) > 2 and words.pieces("a circle") == ["a circle"]
    assert not torch.equal(words([long]), words([long + "a green star"]))
    assert words([long, "a circle"]).shape == (2, 96)


def test_what_is_no_encoder_and_no_pool(tmp_path, pool):
    with pytest.raises(UserError, match="is no encoder of LoRAs"):
        lora_search.Searcher(pool / "member-1.safetensors")
    for head in ("{", "[]", '{"model": []}', '{"model": "other"}', '{"model": "demo"}'):
        checkpoint.save(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {"lora_encoder": head})
        with pytest.raises(UserError, match="is no encoder of LoRAs"):
            lora_search.Searcher(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="is no table of a pool"):
        lora_search.pool(tmp_path)
    for text in ("{", "[]", '{"a": {}}', '{"a": 3}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="is no table of a pool"):
            lora_search.pool(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="expected at least 2 of each"):
        retriever.TrainRetriever(pool=tmp_path).task()
