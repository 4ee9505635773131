"""The recipe from the command to the file, with the measuring critic on a free port and the demo model."""

import json
import threading

import pytest
from PIL import Image

import sample
from flux import pictures
from flux.errors import UserError
from vlm_client import measuring


@pytest.fixture
def url():
    with measuring.serve(0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_picture_its_regions_and_the_picture_after(url, tmp_path, capsys):
    words = ["artaug", "a red circle in dim light", "--steps", "2", "--device", "cpu", "--ledger", str(tmp_path / "kept")]
    sample.main([*words, "--vlm", url, "--out", str(tmp_path / "a")])
    path, = (tmp_path / "a").glob("*.png")
    said = pictures.read_metadata(path)
    assert said["recipe"] == "artaug" and said["critic"].startswith("measuring-critic-2 at http")
    edits = said["plan"]["edits"]
    assert 1 <= len(edits) <= 3 and "no language model" in said["plan"]["analysis"]
    assert "critic: measuring-critic-2 at" in capsys.readouterr().out
    assert Image.open(path).width > 256 * (2 + len(edits)), "before, each region, after"
    kept = [json.loads(line) for line in (tmp_path / "kept" / "ledger.jsonl").read_text().splitlines()]
    assert len(kept) == 1 and "reply" in kept[0]
    sample.main(["--from", str(path), "--out", str(tmp_path / "b")])
    again, = (tmp_path / "b").glob("*.png")
    assert Image.open(again).tobytes() == Image.open(path).tobytes()
    assert len((tmp_path / "kept" / "ledger.jsonl").read_text().splitlines()) == 1, "the ledger answered"


@pytest.mark.parametrize("words", [["a red circle"], ["--vlm", "http://127.0.0.1:9"], ["a", "--vlm", "ftp://x"]])
def test_mistakes_are_told(words, tmp_path):
    with pytest.raises(UserError, match="--vlm.*expected") as error:
        sample.main(["artaug", *words, "--out", str(tmp_path), "--ledger", str(tmp_path / "kept")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("words", "said"), [
    (("--shift", "3"), "--shift came with artaug"), (("--strips",), "--strips came with artaug"),
    (("--model", "demo-fill"), "--model demo-fill draws from a mask too")])
def test_flags_that_it_does_not_heed_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        sample.main(["artaug", "a red circle", "--vlm", "http://localhost:1", *words])
