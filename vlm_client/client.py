"""Questions about pictures to a server that speaks the OpenAI chat protocol: vLLM, SGLang, LMDeploy, `transformers serve`.

    critic = Critic("http://localhost:8000", "runs/critic")
    plan, = critic.plans([(picture, "a lighthouse in a storm")])

One picture has one deadline; in it a question is tried at most five times: refused connections, time-outs, broken answers,
429 and 5xx are tried again after a growing, random pause, or when `Retry-After` says. Servers that refuse
`response_format` (`transformers serve` does, with 422) are asked without; every reply is checked here all the same.
The key comes from VLM_API_KEY and goes into one header, never into a log, a ledger or an error.
"""

import asyncio
import base64
import email.utils
import io
import json
import os
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

from vlm_client import VlmError, boxes, critique
from vlm_client.critique import EditPlan, ReplyError
from vlm_client.ledger import Ledger, key

KEY = "VLM_API_KEY"  # the environment variable
TRIES = 5
REASKED = 2  # times that a reply without a plan is sent back with what was wrong
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
BODY_LIMIT = 4 << 20  # bytes of an answer
FORMATS = ("json_schema", "json_object", None)  # of response_format; the next one after a refusal
AGAIN = {408, 425, 429}  # and 5xx: worth another try
REFUSALS = {400, 415, 422, 501}  # with which servers refuse a response_format that they do not know


class Refused(VlmError):
    """An answer that another try would not change."""

    def __init__(self, words: str, status: int):
        super().__init__(words)
        self.status = status  # of HTTP


class Failed(VlmError):
    """A try that may go better next time; `pause` seconds from now if the server said when."""

    def __init__(self, words: str, pause: float | None = None):
        super().__init__(words)
        self.pause = pause


@dataclass(frozen=True)
class Picture:
    """As it is sent."""

    data: bytes  # of a PNG
    size: tuple[int, int]  # width, height

    @classmethod
    def of(cls, pil: Image.Image, model: str, max_pixels: int) -> "Picture":
        """In a size that the model's own processor leaves as it is, so that boxes in pixels mean these."""
        size = boxes.resized(*pil.size, boxes.processor(model), max_pixels)
        pil = pil.convert("RGB")
        file = io.BytesIO()
        (pil if pil.size == size else pil.resize(size, Image.Resampling.LANCZOS)).save(file, "PNG")
        return cls(file.getvalue(), size)


class Critic:
    """One endpoint and one ledger. `model` and `convention` default to what the server offers and the model's name says."""

    def __init__(self, url: str, folder: Path | str, model: str | None = None, convention: str | None = None,
                 timeout_s: float = 120.0, concurrency: int = 4, max_regions: int = critique.MAX_REGIONS,
                 max_pixels: int = 1024 * 1024, max_tokens: int = 1024):
        self.url, self.timeout_s, self.concurrency = base(url), timeout_s, concurrency
        self.model, self.convention, self.max_regions = model, convention, max_regions
        self.max_pixels, self.max_tokens = max_pixels, max_tokens
        if convention not in (None, *boxes.CONVENTIONS):
            raise VlmError(f"box convention {convention!r} came, expected one of {', '.join(boxes.CONVENTIONS)}; take one")
        self.ledger = Ledger(Path(folder))
        self.format = 0  # index in FORMATS: the first that was not refused
        self._key = read_key()

    @property
    def keyed(self) -> bool:
        return self._key is not None

    @property
    def name(self) -> str:
        """Who answered, for logs and files."""
        return f"{critique.readable(self.model)} at {self.url}"

    def plans(self, pairs: Iterable[tuple[Image.Image, str]]) -> list[EditPlan]:
        """Of each (picture, prompt), in order. VlmError once a question has no answer; those before are in the ledger."""
        async def all_of_them(client: httpx.AsyncClient) -> list[EditPlan]:
            await self.choose_model(client)
            gate, locks = asyncio.Semaphore(self.concurrency), {}
            tasks = [asyncio.ensure_future(self.plan(client, gate, locks, pil, prompt)) for pil, prompt in pairs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return self.run(all_of_them)

    def models(self) -> list[str]:
        return self.run(self.list_models)

    def run(self, work):
        async def connected():
            headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
            tls = self.url.startswith("https:")  # reading the certificates takes longer than many an answer
            async with httpx.AsyncClient(headers=headers, verify=tls, trust_env=False, follow_redirects=False) as client:
                return await work(client)
        return asyncio.run(connected())

    async def plan(self, client, gate: asyncio.Semaphore, locks: dict, pil: Image.Image, prompt: str) -> EditPlan:
        """Asked again where a reply holds no plan; after the last an empty plan, that says why."""
        async with gate:
            picture = Picture.of(pil, self.model, self.max_pixels)
            scale = self.convention or boxes.convention(self.model)
            asked = words = critique.question(prompt, scale, picture.size, self.max_regions)
            refused, end = [], time.monotonic() + self.timeout_s
            for _ in range(1 + REASKED):
                reply = await self.ask(client, locks, picture, words, end)
                try:
                    plan = critique.parse(reply, prompt, scale, picture.size, self.max_regions)
                    return EditPlan(plan.edits, plan.analysis, (*refused, *plan.refused), self.name)
                except ReplyError as error:
                    refused.append(str(error))
                    words = f"{asked}\n\nAn earlier answer could not be used: {error}."
            return EditPlan((), "", tuple(refused), self.name)

    async def ask(self, client, locks: dict, picture: Picture, words: str, end: float) -> str:
        """The reply to words beside a picture, from the ledger if it is there, by `end` of the monotonic clock."""
        sha = self.ledger.keep_picture(picture.data)
        request = {"url": self.url, "model": self.model, "text": words, "picture": sha, "max_tokens": self.max_tokens}
        name = key(request)
        async with locks.setdefault(name, asyncio.Lock()):
            if name in self.ledger.answers:
                return self.ledger.answers[name]["reply"]
            uri = f"data:image/png;base64,{base64.b64encode(picture.data).decode()}"
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": words}]
            body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                    "max_tokens": self.max_tokens}
            started = time.time()

            def note(offered: int, outcome: dict) -> None:
                row = {"key": name, "time": round(started, 3), "seconds": round(time.time() - started, 3)}
                self.ledger.write(row | {"response_format": FORMATS[offered], "request": request} | outcome)

            return await self.persist(client, "POST", "/chat/completions", body, content_of, end, note)

    async def list_models(self, client) -> list[str]:
        return await self.persist(client, "GET", "/models", None, models_of, time.monotonic() + self.timeout_s)

    async def choose_model(self, client) -> None:
        if self.model is None:
            offered = await self.list_models(client)
            if len(offered) != 1:
                names = self.shown(", ".join(offered[:8]))
                raise VlmError(f"{self.url} offers {len(offered)} models ({names}), expected one or a name; name one")
            self.model = offered[0]

    async def persist(self, client, method: str, path: str, body: dict | None, read, end: float, note=None):
        """What `read` finds in the answer's JSON, in at most TRIES tries and before `end`. `note` keeps outcomes.

        A try may take half of the time that is left, so that one that hangs is not the only one.
        """
        offered, tries, failure = self.format, 0, "none, no time was left"
        while tries < TRIES and (left := end - time.monotonic()) > 0:
            tries += 1
            limit = left if tries == TRIES else left / 2
            try:
                async with asyncio.timeout(limit):
                    found = read(await self.exchange(client, method, path, body and self.formatted(body, offered)))
                found = self.blotted(found) if isinstance(found, str) else [self.blotted(text) for text in found]
                self.format = offered
                if note:
                    note(offered, {"reply": found, "tries": tries})
                return found
            except TimeoutError:
                failure = Failed(f"no answer in {limit:.1f} s")
            except Failed as error:
                failure = error
            except Refused as error:
                if note:
                    note(offered, {"error": str(error)})
                if not body or not FORMATS[offered] or error.status not in REFUSALS:
                    raise
                failure, offered = error, offered + 1
                continue
            if note:
                note(offered, {"error": str(failure)})
            pause = failure.pause
            if pause is None:
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1)) * random.uniform(0.5, 1)
            if pause > end - time.monotonic():
                break
            if tries < TRIES:
                await asyncio.sleep(pause)
        raise VlmError(f"{self.url}{path} gave no usable answer in {tries} tries and {self.timeout_s:g} s, the last was: "
                       f"{failure}; expected a completion; see that the server runs, or give it more time")

    def formatted(self, body: dict, offered: int) -> dict:
        match FORMATS[offered]:
            case "json_schema":
                wanted = {"name": "edit_plan", "strict": True, "schema": critique.schema(self.max_regions)}
                return body | {"response_format": {"type": "json_schema", "json_schema": wanted}}
            case "json_object":
                return body | {"response_format": {"type": "json_object"}}
        return body

    async def exchange(self, client, method: str, path: str, body: dict | None) -> object:
        """One try -> the answer's JSON."""
        try:
            async with client.stream(method, self.url + path, json=body, timeout=None) as answer:
                text, length = bytearray(), 0
                async for chunk in answer.aiter_raw():
                    length += len(chunk)
                    if length > BODY_LIMIT:
                        raise Failed(f"an answer of over {BODY_LIMIT >> 20} MB")
                    text += chunk
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
            if isinstance(error, VlmError):
                raise
            raise Failed(self.shown(f"{type(error).__name__}: {error}")) from None  # its request holds the key
        if answer.status_code != 200:
            raise self.failure(answer, bytes(text))
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise Failed(f"an answer that is no JSON ({type(error).__name__})") from None

    def failure(self, answer: httpx.Response, text: bytes) -> VlmError:
        status = answer.status_code
        said = f"HTTP {status} {self.shown(text[:2000].decode(errors='replace'))}".strip()
        if status in AGAIN or status >= 500 and status != 501:
            return Failed(said, seconds(answer.headers.get("retry-after")))
        advice = {401: f"set {KEY}", 403: f"set {KEY}", 404: "check the URL and the model's name",
                  413: "send smaller pictures, by max_pixels"}.get(status, "see what the server says")
        if 300 <= status < 400:
            advice = f"give the URL it leads to, {self.shown(answer.headers.get('location', ''))}"
        return Refused(f"{self.url} answered {said}, expected a chat completion; {advice}", status)

    def blotted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def shown(self, text: str) -> str:
        """Words of the server in one short line of ours."""
        return critique.readable(self.blotted(text))[:300]


def base(url: str) -> str:
    """http://host:8000 means http://host:8000/v1; what has a path stays as it is."""
    try:
        parsed = httpx.URL(url.strip())
        sound = parsed.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", parsed.host) and not parsed.userinfo
    except (httpx.InvalidURL, ValueError, TypeError):
        sound = False
    if not sound or parsed.query or parsed.fragment:  # what is not sound may hold a password: it is not repeated
        raise VlmError("an address that is no plain URL came, expected one without user, password and query; write it as "
                       f"http://localhost:8000, and a key into {KEY}")
    text = str(parsed).rstrip("/")
    return text if parsed.path.strip("/") else f"{text}/v1"


def read_key() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key) or 0 < len(key) < 4:
        raise VlmError(f"{KEY} holds what no header can carry, expected at least 4 printable ASCII letters; set it anew")
    return key or None


def seconds(text: str | None) -> float | None:
    """A Retry-After header, in seconds or as a date -> seconds from now."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def content_of(answer: object) -> str:
    """The text of a chat completion, which some servers give in parts."""
    try:
        content = answer["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise Failed("an answer without choices[0].message.content")
    return content


def models_of(answer: object) -> list[str]:
    try:
        return [str(row["id"]) for row in answer["data"]]
    except (KeyError, TypeError):
        raise Failed("an answer without the names of models") from None
