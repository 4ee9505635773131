"""A critic that measures: `python -m vlm_client.measuring --port 8000`. It is no language model, and says so in each reply.

It speaks the protocol of a Qwen2-VL endpoint and answers the same question in the same schema, so that a machine without
one can run everything. What it calls weak is arithmetic on pixels: six measures, each a score from 1 to 10. It cannot see
what a picture shows; the prompt of a region is the picture's own prompt with words against what was measured.
"""

import argparse
import base64
import binascii
import io
import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from vlm_client import boxes, critique
from vlm_client.boxes import Box

MODEL = "measuring-critic-2"
SAYS = "This is a measuring critic, no language model: it computes figures from pixels and does not know what they show."
WEAK = 9.0  # a score below is a weakness
POINTS = 3  # headings that the question asks for
BODY_LIMIT = 64 << 20  # bytes
PIXEL_LIMIT = 64_000_000


@dataclass(frozen=True)
class Measures:
    """Of a picture in [0, 1]."""

    exposure: float  # mean luminance
    contrast: float  # standard deviation of luminance
    colourfulness: float  # Hasler and Suesstrunk 2003: of 15 "slightly", 45 "averagely", 82 "highly colourful" pictures
    sharpness: float  # luminance gradient per pixel, mean of its steepest hundredth
    balance: float  # how far the centre of visual weight is from the picture's, as a share of half a diagonal
    clipping: float  # share of pixels that are black or white to the last step


SCORES = {  # measure -> its values and their scores, joined by straight lines
    "exposure": ((0, 0.15, 0.3, 0.42, 0.58, 0.7, 0.85, 1), (1, 3, 7, 10, 10, 7, 3, 1)),
    "contrast": ((0, 0.05, 0.12, 0.2, 0.3, 0.4), (1, 3, 6, 9, 10, 9)),
    "colourfulness": ((0, 15, 33, 45, 59, 82, 109, 160), (1, 3, 5, 7, 9, 10, 9, 6)),
    "sharpness": ((0, 0.02, 0.05, 0.1, 0.2), (1, 3, 6, 9, 10)),
    "balance": ((0, 0.05, 0.15, 0.3, 0.5, 1), (10, 10, 8, 6, 4, 1)),
    "clipping": ((0, 0.01, 0.05, 0.2, 0.5, 1), (10, 10, 8, 5, 3, 1)),
}
MENDS = {  # measure -> heading, what against too little and too much of it
    "exposure": ("exposure and lighting", "not dim", "gradient"),
    "contrast": ("exposure and lighting", "gradient", ""),
    "colourfulness": ("colour", "gradient", ""),
    "sharpness": ("detail and texture", "large", "large"),
    "balance": ("composition and camera angle", "large", "large"),
    "clipping": ("exposure and lighting", "gradient", "gradient"),
}


# --- measuring ---

def measure(pil: Image.Image) -> Measures:
    rgb = np.asarray(pil.convert("RGB"), dtype=np.float64) / 255
    grey = luminance(rgb)
    return Measures(float(grey.mean()), float(grey.std()), colourfulness(rgb), steepest(gradient(grey)),
                    imbalance(rgb), float(clipped(rgb).mean()))


def scores(pil: Image.Image) -> dict[str, float]:
    """Each measure's score from 1 to 10."""
    return {name: float(np.interp(value, *SCORES[name])) for name, value in vars(measure(pil)).items()}


def luminance(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W), by the weights of Rec. 709 on sRGB values."""
    return rgb @ np.array([0.2126, 0.7152, 0.0722])


def colourfulness(rgb: np.ndarray) -> float:
    """Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003, eq. 10, on values from 0 to 255."""
    r, g, b = np.moveaxis(rgb * 255, -1, 0)
    rg, yb = r - g, (r + g) / 2 - b
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def gradient(grey: np.ndarray) -> np.ndarray:
    """Length of the luminance gradient, per pixel."""
    return np.hypot(*(np.gradient(grey, axis=axis) if grey.shape[axis] > 1 else np.zeros_like(grey) for axis in (0, 1)))


def steepest(slopes: np.ndarray) -> float:
    count = max(1, slopes.size // 100)
    return float(np.partition(slopes.ravel(), -count)[-count:].mean())


def clipped(rgb: np.ndarray) -> np.ndarray:
    return ((rgb <= 1.5 / 255).all(-1) | (rgb >= 253.5 / 255).all(-1)).astype(float)


def weight(rgb: np.ndarray) -> np.ndarray:
    """How much a pixel stands out: its distance from the picture's median colour."""
    return np.linalg.norm(rgb - np.median(rgb, axis=(0, 1)), axis=-1)


def imbalance(rgb: np.ndarray) -> float:
    heavy = weight(rgb)
    if heavy.sum() < 1e-9:
        return 0.0
    (h, w), total = heavy.shape, heavy.sum()
    x = (heavy.sum(0) * (np.arange(w) + 0.5)).sum() / total / w - 0.5
    y = (heavy.sum(1) * (np.arange(h) + 0.5)).sum() / total / h - 0.5
    return float(np.hypot(x, y) / np.hypot(0.5, 0.5))


# --- judging ---

WHOLE = (0.0, 0.0, 1.0, 1.0)
OF_THE_SUBJECT = ("sharpness", "balance")  # measures that what stands out decides; the others are the whole picture's


def subject_box(rgb: np.ndarray) -> Box:
    """Around what stands out, half as large again; the whole picture where nothing does."""
    heavy = weight(rgb)
    mask = heavy > 0.4 * heavy.max()
    if heavy.max() < 0.05:
        return WHOLE
    sides = []
    for axis in (0, 1):
        found, edge = np.flatnonzero(mask.any(axis)), mask.shape[1 - axis]
        first, last = float(found[0] / edge), float((found[-1] + 1) / edge)
        more = max(0.25 * (last - first), 0.05)
        sides.append((max(0.0, first - more), min(1.0, last + more)))
    (x0, x1), (y0, y1) = sides
    return x0, y0, x1, y1


def mended(prompt: str, mend: str) -> str:
    """The prompt with words for what should be otherwise, in the place where a caption has them.

    A size that is said is what was asked for, and stays; a light that is said goes where it is the weakness itself. No light
    is added: "in bright light" takes more contrast than it gives exposure.
    """
    words = " ".join(prompt.split()[:60]) or "the same picture"
    match mend:
        case "gradient" if "background" not in words:
            return f"{words} on a gradient background"
        case "gradient" if "gradient background" not in words:
            return words.replace("background", "gradient background", 1)
        case "not dim":
            return re.sub(r",? in dim light\b", "", words)
        case "large" if not re.search(r"\b(small|medium|large)\b", words):
            named = re.sub(r"\ban? (?!(\w+ ){0,2}(background|shadow)\b)", "a large ", words)
            return named if "large" in named else f"large {named}"
    return words


def dim_said(prompt: str) -> bool:
    return bool(re.search(r"\bin dim light\b", prompt))


def weaknesses(scored: dict[str, float]) -> list[str]:
    """Measures that are weak, the worst first, of the three worst headings: dim and pale are two sides of one weakness."""
    weak = [name for name in sorted(scored, key=scored.get) if scored[name] < WEAK]
    points = list(dict.fromkeys(MENDS[name][0] for name in weak))[:POINTS]
    return [name for name in weak if MENDS[name][0] in points]


def critique_of(pil: Image.Image, prompt: str, convention: str, most: int) -> dict:
    """The reply, as the schema has it: an edit for the subject and one for the whole, each with all the words it needs."""
    measured, scored = vars(measure(pil)), scores(pil)
    rgb = np.asarray(pil.convert("RGB"), dtype=np.float64) / 255
    weak = weaknesses(scored)
    edits = []

    def mends(names: list[str]) -> str:
        words = prompt
        for name in names:
            values, points = SCORES[name]
            low = measured[name] < values[points.index(max(points))]
            words = mended(words, MENDS[name][1 if low else 2])
        return words

    whole, subject = [[name for name in weak if (name in OF_THE_SUBJECT) == local] for local in (False, True)]
    apart = mends(weak) != mends(whole)  # else an edit of the whole says all there is to say
    force = 1 if dim_said(mends(whole)) != dim_said(prompt) else 0.03  # half of another light is no light that there is
    for names, box, strength, words in ((whole, WHOLE, force / 4 if apart else force, mends(whole)),
                                        (subject if apart else (), subject_box(rgb), force, mends(weak))):
        if names and words != prompt:
            edits.append({"box": list(boxes.from_fractions(box, convention, pil.size)), "aspect": MENDS[names[0]][0],
                          "prompt": words, "strength": strength})
    told = ", ".join(f"{name} {scored[name]:.1f}/10 ({value:.3g})" for name, value in measured.items())
    return {"analysis": f"{SAYS} {told}; mean {np.mean(list(scored.values())):.2f}/10.", "edits": edits[:most]}


# --- serving ---

class Mistake(ValueError):
    """What the caller did wrong: becomes HTTP 400."""


def answer(request: object) -> dict:
    """A chat completion request -> a chat completion."""
    try:
        parts = request["messages"][-1]["content"]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        [uri] = uris
        kind, data = uri.split(",", 1)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        raise Mistake("expected one user turn with one text and one picture as a data URI") from None
    if not re.fullmatch(r"data:image/(png|jpeg|webp);base64", kind):
        raise Mistake("expected the picture as data:image/png;base64,...; addresses are not fetched")
    pil = decoded(data)
    prompt = re.search(r"<prompt>(.*?)</prompt>", text, re.DOTALL)
    most = re.search(r"at most (\d{1,3}) edits", text)
    asked = [name for name in boxes.CONVENTIONS if critique.scale(name, pil.size) in text]
    reply = critique_of(pil, prompt[1] if prompt else "", asked[0] if asked else "frac",
                        int(most[1]) if most else critique.MAX_REGIONS)
    message = {"role": "assistant", "content": json.dumps(reply)}
    return {"id": "measured", "object": "chat.completion", "created": 0, "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def decoded(data: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG", "WEBP")) as pil:
            if pil.width * pil.height > PIXEL_LIMIT:
                raise Mistake(f"the picture has over {PIXEL_LIMIT // 10**6} megapixels")
            return pil.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake("the picture cannot be read") from error


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds that a silent caller is kept
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.rstrip("/") == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "minflux"}]})
        else:
            self.mistake(404, "expected /v1/models or /v1/chat/completions")

    def do_POST(self):
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= BODY_LIMIT:
            self.close_connection = True
            self.mistake(413, f"expected a Content-Length of at most {BODY_LIMIT} bytes")
            return
        body = self.rfile.read(length)
        if self.path.rstrip("/") != "/v1/chat/completions":
            self.mistake(404, "expected /v1/models or /v1/chat/completions")
            return
        try:
            self.reply(200, answer(json.loads(body)))
        except Mistake as error:
            self.mistake(400, str(error))
        except (ValueError, RecursionError):
            self.mistake(400, "expected JSON")

    def mistake(self, status: int, words: str) -> None:
        self.reply(status, {"error": {"message": words, "type": "invalid_request_error", "code": status}})

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words) -> None:
        """Silent: the client keeps the ledger."""


def serve(port: int) -> ThreadingHTTPServer:
    """On this machine alone; port 0 takes a free one, in `server_port`."""
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_client.measuring", description="A critic that measures pictures.")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0 takes a free one (default: 8000)")
    with serve(parser.parse_args(argv).port) as server:
        print(f"{MODEL} at http://127.0.0.1:{server.server_port}; it measures and is no language model; Ctrl-C ends it",
              flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped")


if __name__ == "__main__":
    main()
