"""P12: the endpoint may do anything. Deadlines, tries, pauses, the ledger, the key; and the measuring critic, served."""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fault_server import FAULTS, FaultServer
from PIL import Image

from vlm_client import VlmError, boxes, client, critique, ledger, measuring
from vlm_client.__main__ import main
from vlm_client.client import Critic

ROOT = Path(__file__).parents[1]
SECRET = "sk-verysecret-0123456789"
DEADLINE_S = 10.0  # of a picture, where it is measured: a tenth of it is more than a busy machine is late
PICTURE = Image.new("RGB", (40, 30), (90, 60, 30))
PROMPT = "a brown wall"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setenv(client.KEY, SECRET)
    with FaultServer() as server:
        yield server


def critic(server, folder, name="x", faults=(), **more):
    server.schedules[name] = list(faults)
    return Critic(server.url(name), folder, model="test", **{"timeout_s": 20.0, **more})


def rows(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


GOOD = {"fenced JSON", "inverted boxes", "key in the reply"}  # taken at the first try
MENDED = {"422 on response_format", "400 on response_format", "prose"}  # at the second or third
FATAL = {"401", "redirects", "429, in a year"}
SLOW = {"hangs", "drips headers", "drips the body"}  # take half of the time that there is


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(fault, server, tmp_path):
    one = critic(server, tmp_path, faults=[fault], timeout_s=3.0 if fault in SLOW else 6.0)
    if fault in FATAL:
        with pytest.raises(VlmError) as error:
            one.plans([(PICTURE, PROMPT)])
        assert "\n" not in str(error.value) and SECRET not in str(error.value)
        assert sum(server.asked["x"].values()) == 1
        return
    plan, = one.plans([(PICTURE, PROMPT)])
    assert [edit.box for edit in plan.edits] == [pytest.approx((0.1, 0.1, 0.6, 0.6))]
    tries = sum(server.asked["x"].values())
    assert tries == 1 if fault in GOOD else 2 <= tries <= 3
    assert plan.critic == f"test at {server.url('x')}" and bool(plan.refused) == (fault == "prose")
    assert ("reply" in rows(tmp_path)[-1]) and SECRET not in (tmp_path / "ledger.jsonl").read_text()


def test_random_schedules_of_faults(server, tmp_path, hard, caplog, capfd):
    """Ends in time with a plan or one line; no question more than five times; the key is nowhere."""
    caplog.set_level(logging.DEBUG)
    rng, late, failed = random.Random(0), [], 0
    schedules = [rng.choices(list(FAULTS), k=rng.randint(1, 7)) for _ in range(2000 if hard else 100)]

    def go(i):
        started = time.monotonic()
        try:
            one = critic(server, tmp_path / str(i), str(i), schedules[i], timeout_s=DEADLINE_S)
            plan, = one.plans([(PICTURE, PROMPT)])
            return time.monotonic() - started, plan
        except VlmError as error:
            return time.monotonic() - started, error

    critic(server, tmp_path / "warm", "warm").plans([(PICTURE, PROMPT)])  # first imports are nobody's deadline
    with ThreadPoolExecutor(16) as pool:
        for i, (seconds, result) in enumerate(pool.map(go, range(len(schedules)))):
            late.append(seconds / DEADLINE_S)
            failed += isinstance(result, VlmError)
            assert "\n" not in str(result) and SECRET not in str(result)
            assert all(count <= client.TRIES for count in server.asked.get(str(i), {}).values()), schedules[i]
            kept = (tmp_path / str(i) / "ledger.jsonl").read_text()
            assert SECRET not in kept and "base64" not in kept
    said = "".join(capfd.readouterr())
    print(f"{len(late)} schedules, {failed} without a plan, the slowest took {max(late):.3f} of its deadline")
    assert max(late) <= 1.1 and 0 < failed < len(late)
    assert SECRET not in caplog.text and SECRET not in said


def test_nobody_listens(tmp_path, monkeypatch):
    assert client.FIRST_PAUSE_S == 0.5
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.2)
    started = time.monotonic()
    with pytest.raises(VlmError, match="gave no usable answer in 5 tries"):
        Critic("http://127.0.0.1:9", tmp_path, "test", timeout_s=30).plans([(PICTURE, PROMPT)])
    assert 1.4 < time.monotonic() - started < 4.8, "pauses of 0.2, 0.4, 0.8, 1.6 s, each times 0.5 to 1"


def test_pauses_grow_and_differ(server, tmp_path, monkeypatch):
    pauses = []

    async def sleep(seconds, real=asyncio.sleep):
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    for i in range(20):
        with pytest.raises(VlmError, match="in 5 tries"):
            critic(server, tmp_path / str(i), str(i), ["500"] * 5, timeout_s=30).plans([(PICTURE, PROMPT)])
    by_try = [[pause for pause in pauses[i::4] if pause] for i in range(4)]
    for i, some in enumerate(by_try):
        assert len(set(some)) > 15 and all(0.02 * 2**i * 0.5 <= pause <= 0.02 * 2**i for pause in some)


def test_retry_after_is_waited_for(server, tmp_path):
    critic(server, tmp_path, faults=["429, in a second"], timeout_s=20).plans([(PICTURE, PROMPT)])
    first, second = server.times["x"]
    assert 1 <= second - first < 4
    assert client.seconds("17") == 17 and client.seconds("-1") is None and client.seconds("Mon, 99 Foo") is None
    assert client.seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_refused_format_is_not_offered_again(server, tmp_path):
    one = critic(server, tmp_path, faults=["422 on response_format"] * 2, timeout_s=20, concurrency=1)
    one.plans([(PICTURE, PROMPT), (PICTURE, "another prompt")])
    assert client.FORMATS[one.format] is None and sum(server.asked["x"].values()) == 3 + 1
    assert [row["response_format"] for row in rows(tmp_path)] == ["json_schema", "json_object", None, None]
    two = critic(server, tmp_path / "b", "y", ["401"])
    with pytest.raises(VlmError, match="set VLM_API_KEY"):
        two.plans([(PICTURE, PROMPT)])
    assert two.format == 0


def test_prose_is_sent_back_twice(server, tmp_path):
    plan, = critic(server, tmp_path, faults=["prose"] * 3).plans([(PICTURE, PROMPT)])
    assert plan.edits == () and len(plan.refused) == 3
    texts = [row["request"]["text"] for row in rows(tmp_path)]
    assert "could not be used: the reply had no whole JSON object" in texts[1] and "could not" not in texts[0]


def test_a_bound_on_questions_at_once(server, tmp_path):
    server.pause, most, running = 0.05, 0, 0
    original = Critic.exchange

    async def counted(self, *words):
        nonlocal most, running
        running += 1
        most = max(most, running)
        try:
            return await original(self, *words)
        finally:
            running -= 1

    one = critic(server, tmp_path, concurrency=3, timeout_s=30)
    one.exchange = counted.__get__(one)
    assert len(one.plans([(PICTURE, f"{PROMPT} {i}") for i in range(12)])) == 12
    assert most == 3


# The ledger.

def test_no_answered_question_is_asked_twice(server, tmp_path):
    pairs = [(PICTURE, f"{PROMPT} {i % 4}") for i in range(8)]
    plans = critic(server, tmp_path, timeout_s=20).plans(pairs)
    assert set(server.asked["x"].values()) == {1} and len(server.asked["x"]) == 4 and plans[:4] == plans[4:]
    assert critic(server, tmp_path).plans(pairs) == plans and sum(server.asked["x"].values()) == 4
    other = PICTURE.copy()
    other.putpixel((0, 0), (0, 0, 0))
    critic(server, tmp_path).plans([(other, f"{PROMPT} 0")])
    assert sum(server.asked["x"].values()) == 5, "another picture is another question"
    sent = {row["request"]["picture"] for row in rows(tmp_path)}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == sent and len(sent) == 2
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / f"{rows(tmp_path)[0]['request']['picture']}.png")),
                          np.asarray(PICTURE))


def test_a_torn_line_is_passed_over(server, tmp_path):
    critic(server, tmp_path).plans([(PICTURE, "one prompt here"), (PICTURE, "two prompts here")])
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 200, 23):
        path.write_bytes(whole[:-cut])
        found = ledger.Ledger(tmp_path)
        assert (len(found.answers), found.torn) == ((2, 0) if cut == 1 else (1, 1))
        found.write({"key": "k", "reply": "r"})
        assert ledger.Ledger(tmp_path).answers.keys() > {"k"} and len(ledger.Ledger(tmp_path).answers) == len(found.answers)
    path.write_bytes(b'\xff\n[]\n{"reply": 1}\n"x"\n7\n' + whole)
    assert len(ledger.Ledger(tmp_path).answers) == 2


LOOP = """
import sys
from PIL import Image
from vlm_client.client import Critic
critic = Critic(sys.argv[1], sys.argv[2], model="test", concurrency=1)
critic.plans([(Image.new("RGB", (8, 8)), f"a brown wall {i}") for i in range(int(sys.argv[3]))])
"""


def test_a_killed_loop_repeats_at_most_one_request(server, tmp_path, hard):
    server.pause, rng, count, kills = 0.02, random.Random(0), 60, 0
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    while kills < (100 if hard else 5):
        before = sum(server.asked.get("x", {}).values())
        child = subprocess.Popen([sys.executable, "-c", LOOP, server.url("x"), tmp_path, str(count)], env=env)
        while child.poll() is None and sum(server.asked.get("x", {}).values()) == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        elif child.wait() == 0:
            count += 60
    subprocess.run([sys.executable, "-c", LOOP, server.url("x"), tmp_path, str(count)], env=env, check=True)
    assert len(server.asked["x"]) == count == len(ledger.Ledger(tmp_path).answers)
    assert sum(server.asked["x"].values()) <= count + kills
    assert all(repeats <= 1 + kills for repeats in server.asked["x"].values())


# The edge.

@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://user:pw-secret@host", "http://host?key=pw-secret",
                                 "http://[", "http://host/#a", "http://\x00"])
def test_addresses_that_are_none(url, tmp_path):
    with pytest.raises(VlmError, match="no plain URL") as error:
        Critic(url, tmp_path)
    assert "secret" not in str(error.value)


def test_addresses_may_leave_out_the_version():
    assert client.base("http://localhost:8000/") == client.base("http://localhost:8000/v1") == "http://localhost:8000/v1"
    assert client.base("https://host/compatible-mode/v1/") == "https://host/compatible-mode/v1"


@pytest.mark.parametrize("key", ["sk-very\nsecret-0123", "sk-schlüssel-secret", "abc"])
def test_keys_that_no_header_carries(key, tmp_path, monkeypatch):
    monkeypatch.setenv(client.KEY, key)
    with pytest.raises(VlmError) as error:
        Critic("http://localhost:1", tmp_path)
    assert key not in str(error.value) and "secret" not in str(error.value)


def test_the_key_goes_into_the_header_alone(server, tmp_path):
    one = critic(server, tmp_path, faults=["key in an error", "key in the reply"], timeout_s=10)
    plan, = one.plans([(PICTURE, PROMPT)])
    assert plan.analysis == "***", "the server got the key, and what it says of it is blotted out"
    assert SECRET not in repr(one) and SECRET not in repr(plan)


def test_pictures_are_sent_as_the_processor_leaves_them():
    sent = client.Picture.of(Image.new("RGBA", (1024, 1024)), "Qwen2.5-VL-7B", 1024 * 1024)
    assert sent.size == (1008, 1008) and boxes.resized(*sent.size) == sent.size
    assert client.Picture.of(PICTURE, "measuring-critic-2", 10**6).size == PICTURE.size
    with pytest.raises(VlmError, match="ratio of 200"):
        client.Picture.of(Image.new("RGB", (2, 900)), "qwen2-vl", 10**6)


# The measuring critic.

@pytest.fixture
def measured():
    with measuring.serve(0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_measuring_critic_answers_and_says_what_it_is(measured, tmp_path):
    dull = Image.new("RGB", (128, 128), (30, 30, 30))
    dull.paste((90, 20, 20), (10, 10, 40, 40))
    one = Critic(measured, tmp_path)
    plan, again = one.plans([(dull, "a red square on black"), (dull, "a red square on black")])
    assert plan == again and 1 <= len(plan.edits) <= 3 and not plan.refused
    assert "measuring critic, no language model" in plan.analysis and plan.critic.startswith("measuring-critic-2 at http")
    whole, subject = plan.edits
    assert whole.box == (0, 0, 1, 1) and whole.prompt == "a red square on black on a gradient background"
    assert subject.prompt.startswith("a large red square on black ") and subject.box == pytest.approx(
        (0.02, 0.02, 0.37, 0.37), abs=0.02)
    for convention in boxes.CONVENTIONS:
        same, = Critic(measured, tmp_path, convention=convention).plans([(dull, "a red square on black")])
        assert [edit.box for edit in same.edits] == [pytest.approx(edit.box, abs=0.01) for edit in plan.edits]


def test_measures_are_those_of_known_pictures():
    def of(array):
        return measuring.measure(Image.fromarray(np.asarray(array, np.uint8)))

    flat = of(np.full((64, 64, 3), 128))
    assert vars(flat) == pytest.approx({"exposure": 128 / 255, "contrast": 0, "colourfulness": 0, "sharpness": 0,
                                        "balance": 0, "clipping": 0}, abs=1e-9)
    half = np.zeros((64, 64, 3))
    half[:, 32:] = 255
    half = of(half)
    assert (half.exposure, half.contrast, half.clipping) == pytest.approx((0.5, 0.5, 1))
    assert half.sharpness == 0.5, "central differences spread a step over two pixels"
    corner = np.full((64, 64, 3), 128)
    corner[:8, :8] = 255
    assert of(corner).balance == pytest.approx(np.hypot(28, 28) / np.hypot(32, 32))
    red = np.zeros((8, 8, 3))
    red[..., 0] = 255
    assert of(red).colourfulness == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert of(np.full((1, 1, 3), 9)).sharpness == 0


def test_scores_follow_the_measures():
    rng = np.random.default_rng(0)
    fine = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((128, 128))
    dim = fine.point(lambda value: value // 8)
    good, bad = measuring.scores(fine), measuring.scores(dim)
    assert all(1 <= score <= 10 for score in (*good.values(), *bad.values()))
    assert good["exposure"] > 9 > 3 > bad["exposure"] and good["contrast"] > bad["contrast"]
    edits = measuring.critique_of(dim, f"{PROMPT} in dim light", "frac", 4)["edits"]
    assert edits and not any("dim light" in edit["prompt"] for edit in edits)
    said = measuring.critique_of(dim, PROMPT, "frac", 4)["edits"]
    assert max(edit["strength"] for edit in edits) == 1 and said and all(edit["strength"] <= 0.03 for edit in said), \
        "half of another light is no light that there is; half of a gradient is one"
    assert measuring.critique_of(fine, PROMPT, "frac", 0)["edits"] == []


def test_the_three_worst_headings_are_weak_with_all_their_measures():
    scores = {"contrast": 3.0, "colourfulness": 4.0, "sharpness": 5.0, "balance": 6.0, "exposure": 8.0, "clipping": 10.0}
    assert measuring.weaknesses(scores) == ["contrast", "colourfulness", "sharpness", "exposure"]
    assert measuring.weaknesses(scores | {"exposure": 9.5}) == ["contrast", "colourfulness", "sharpness"]


@pytest.mark.parametrize(("prompt", "mend", "expected"), [
    ("a red circle on a blue background", "gradient", "a red circle on a blue gradient background"),
    ("a red circle on a blue gradient background", "gradient", "a red circle on a blue gradient background"),
    ("a lighthouse", "gradient", "a lighthouse on a gradient background"),
    ("a star above an orange ring on a pink background", "large",
     "a large star above a large orange ring on a pink background"),
    ("a small star above an orange ring", "large", "a small star above an orange ring"),
    ("blue ring bottom, red background", "large", "large blue ring bottom, red background"),
    ("on a white background, a cyan cross", "large", "on a white background, a large cyan cross"),
    ("a heart", "not dim", "a heart"), ("a heart in soft light", "not dim", "a heart in soft light"),
    ("a heart in dim light with a soft shadow", "not dim", "a heart with a soft shadow"),
    ("pink ring, red background, in dim light", "not dim", "pink ring, red background"),
    ("a star with a soft shadow", "large", "a large star with a soft shadow"),
    ("", "large", "large the same picture"), ("a b", "", "a b")])
def test_words_go_where_a_caption_has_them(prompt, mend, expected):
    assert measuring.mended(prompt, mend) == expected


def shows(url):
    return json.dumps({"messages": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]}).encode()


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"{}", b'{"messages": []}', b'{"messages": [{"content": "hi"}]}',
                                  b'{"messages": [{"content": [{"type": "text", "text": "a"}]}]}', b"[" * 50_000,
                                  shows("file:///etc/passwd"), shows("data:image/png;base64,AAAA"), shows(7)])
def test_the_measuring_critic_refuses(body, measured):
    answer = httpx.post(f"{measured}/v1/chat/completions", content=body, trust_env=False)
    assert answer.status_code == 400 and ("expected" in answer.text or "cannot be read" in answer.text)
    assert httpx.get(f"{measured}/secret", trust_env=False).status_code == 404


# The command.

def test_check_says_what_a_server_can(measured, capsys):
    assert main(["check", measured]) == 0
    out = capsys.readouterr().out
    for words in ("measuring-critic-2", "frac, by the name", "json_schema is taken", "pictures    taken"):
        assert words in out


def test_check_fails_in_one_line(server, capsys):
    for words in (["not a url"], [server.url("x"), "--timeout-s", "1"]):
        assert main(["check", *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and SECRET not in err


def test_nothing_of_ours_is_imported():
    code = "import sys, vlm_client.client, vlm_client.measuring; print(sorted({m.split('.')[0] for m in sys.modules}))"
    names = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                           text=True, check=True).stdout
    assert not {"'flux'", "'lora'", "'kernels'", "'torch'"} & set(names.strip("[]\n").split(", "))


def test_the_schema_is_json():
    assert json.loads(json.dumps(critique.schema())) == critique.schema()
