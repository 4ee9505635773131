"""What a critic is asked about a picture, what its reply may be, and the plan of regional edits that it becomes.

A reply is text from outside. Nothing in it is followed; of a reply only boxes, aspects, prompts and strengths are used,
each checked, and whatever is wrong is said in words of ours, so that no part of a reply comes back in the next question.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from vlm_client import VlmError, boxes
from vlm_client.boxes import Box

ASPECTS = ("composition and camera angle", "exposure and lighting", "colour", "atmosphere and effects",
           "detail and texture", "subject rendering")
MAX_REGIONS = 4
WORDS = (3, 80)  # of a region's prompt
PROMPT_LENGTH = 1000  # letters: a word may be long
REPLY_LENGTH = 200_000  # letters; a plan of four edits has about 2,000
BRACES = 100  # objects that a reply may open; each may be read to its end
BOX_TOKENS = re.compile(r"(?:<\|?box(?:_start)?\|?>)?\s*\((-?[\d.]{1,12}),\s*(-?[\d.]{1,12})\),\s*"
                        r"\((-?[\d.]{1,12}),\s*(-?[\d.]{1,12})\)\s*(?:<\|?/?box(?:_end)?\|?>)?")
NAMED_BOX = re.compile(r"<\|?(?:object_ref_start|ref)\|?>([^<]{1,2000})<\|?(?:object_ref_end|/ref)\|?>\s*"
                       + BOX_TOKENS.pattern)


class ReplyError(VlmError):
    """A reply without a usable plan; its words go into the next question."""


@dataclass(frozen=True)
class Edit:
    """One region as it should look."""

    box: Box  # fractions of the picture
    aspect: str
    prompt: str
    strength: float = 1.0


@dataclass(frozen=True)
class EditPlan:
    edits: tuple[Edit, ...] = ()
    analysis: str = ""  # for audit, never used
    refused: tuple[str, ...] = ()  # what was wrong with edits, or replies, that were left out
    critic: str = ""  # who answered

    def as_dict(self) -> dict:
        return asdict(self)


# --- the question ---

def question(prompt: str, convention: str, size: tuple[int, int], max_regions: int = MAX_REGIONS) -> str:
    """The user's turn beside a picture of `size` (width, height as sent) that was made for `prompt`."""
    return f"""This picture was generated from the prompt between the marks.
<prompt>{prompt}</prompt>
Judge it as a photographer and art director would, in this order:
(a) say in one sentence what it shows;
(b) name its three weakest aesthetic points, each under one of these headings: {"; ".join(ASPECTS)};
(c) for each, give the region it concerns, as a box of {scale(convention, size)};
(d) for each, write a complete prompt for that region as it should look: on its own, at most 60 words, with the same \
subjects, the same number of them and the same text in the picture;
(e) if the picture needs no change, give an empty list.
Answer with one JSON object and nothing else, at most {max_regions} edits, strength from 0 to 1:
{{"analysis": "(a) and (b)", "edits": [{{"box": [x1, y1, x2, y2], "aspect": "a heading", "prompt": "the region as it \
should look", "strength": 1}}]}}"""


def scale(convention: str, size: tuple[int, int]) -> str:
    x, y = boxes.spans(convention, size)
    return (f"x1, y1, x2, y2 from the upper left corner, where the right edge of the picture is x = {x} and its lower edge "
            f"y = {y}")


def schema(max_regions: int = MAX_REGIONS) -> dict:
    """JSON schema of a reply, in the subset that servers with constrained decoding understand."""
    edit = {"box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
            "aspect": {"type": "string", "enum": list(ASPECTS)}, "prompt": {"type": "string"},
            "strength": {"type": "number"}}
    edits = {"type": "array", "maxItems": max_regions, "items": {
        "type": "object", "properties": edit, "required": list(edit), "additionalProperties": False}}
    return {"type": "object", "properties": {"analysis": {"type": "string"}, "edits": edits},
            "required": ["analysis", "edits"], "additionalProperties": False}


# --- the reply ---

def parse(reply: str, prompt: str, convention: str, size: tuple[int, int], max_regions: int = MAX_REGIONS) -> EditPlan:
    """ReplyError where there is no plan in it, or one of which no edit can be used."""
    if len(reply) > REPLY_LENGTH or reply.count("{") > BRACES:
        raise ReplyError("the reply was too long, expected a short JSON object; answer with that alone")
    found = last_object(reply)
    if found is None:
        found = {"edits": list(from_tokens(reply))}
        if not found["edits"]:
            raise ReplyError('the reply had no whole JSON object, expected {"analysis": ..., "edits": [...]}; answer with '
                             "nothing else")
    if not isinstance(found.get("edits"), list):
        raise ReplyError('the JSON object had no list named "edits", expected one, empty if nothing is to change; add it')
    edits, refused = [], []
    for i, item in enumerate(found["edits"][:max_regions], 1):
        try:
            edit = read_edit(item, convention, size)
            if plain(edit.prompt) == plain(prompt):
                raise ReplyError("its prompt repeats the picture's prompt")
            if any(boxes.overlap(edit.box, other.box) > 0.9 for other in edits):
                raise ReplyError("its box is that of an earlier edit")
            edits.append(edit)
        except ReplyError as error:
            refused.append(f"edit {i}: {error}")
    if len(found["edits"]) > max_regions:
        refused.append(f"{len(found['edits']) - max_regions} edits above {max_regions} were left out")
    if found["edits"] and not edits:
        raise ReplyError(f"no edit could be used ({'; '.join(refused)}), expected what was asked for; mend them")
    analysis = found.get("analysis")
    return EditPlan(tuple(edits), readable(analysis)[:4000] if isinstance(analysis, str) else "", tuple(refused))


def last_object(reply: str) -> dict | None:
    """The last JSON object in a text that is whole and not part of another."""
    decoder, found, at = json.JSONDecoder(), None, 0
    while (at := reply.find("{", at)) >= 0:
        try:
            found, at = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):  # not closed, or no JSON: perhaps the next brace
            at += 1
    return found


def from_tokens(reply: str) -> Iterator[dict]:
    """Edits in Qwen2-VL's own form, "<heading>: <|object_ref_start|>prompt<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)
    <|box_end|>": the heading is the last one that was named since the box before."""
    start = 0
    for match in NAMED_BOX.finditer(reply):
        before = reply[start:match.start()].lower()
        start = match.end()
        aspect = max(ASPECTS, key=before.rfind)
        yield {"box": list(match.groups()[1:]), "prompt": match[1], "aspect": aspect if aspect in before else None}


def read_edit(item: object, convention: str, size: tuple[int, int]) -> Edit:
    """Repairs swapped corners, numbers written as text and boxes that reach over the picture's edge."""
    if not isinstance(item, dict):
        raise ReplyError("it is no JSON object")
    box = read_box(item.get("box", item.get("bbox_2d")), convention, size)
    aspect = item.get("aspect")
    aspect = " ".join(aspect.lower().split()).replace("color", "colour") if isinstance(aspect, str) else None
    if aspect not in ASPECTS:
        raise ReplyError(f"its aspect is none of {', '.join(ASPECTS)}")
    prompt = readable(item.get("prompt"))
    words = len(prompt.split())
    if not WORDS[0] <= words <= WORDS[1] or len(prompt) > PROMPT_LENGTH:
        raise ReplyError(f"its prompt has {words} words and {len(prompt)} letters, not {WORDS[0]} to {WORDS[1]} words and "
                         f"at most {PROMPT_LENGTH} letters")
    strength = number(item.get("strength", 1))
    if strength is None or not math.isfinite(strength):
        raise ReplyError("its strength is no number")
    return Edit(box, aspect, prompt, min(max(strength, 0.0), 1.0))


def read_box(value: object, convention: str, size: tuple[int, int]) -> Box:
    """Four numbers in any of the scales, or box tokens as text -> fractions, ordered and within the picture."""
    if isinstance(value, str) and (match := BOX_TOKENS.search(value[:200])):
        value = match.groups()
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ReplyError("its box is no list of four numbers")
    numbers = [number(part) for part in value]
    if any(part is None or not math.isfinite(part) for part in numbers):
        raise ReplyError("its box is no list of four finite numbers")
    x1, y1, x2, y2 = boxes.to_fractions(numbers, convention, size)
    whole = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if not boxes.area(whole) <= 1.01:  # a pixel too many is rounding, more is another scale
        raise ReplyError(f"its box is larger than the picture, which ends at {boxes.spans(convention, size)}")
    box = tuple(min(max(part, 0.0), 1.0) for part in whole)
    if boxes.area(box) < 0.01:
        raise ReplyError("its box covers less than a hundredth of the picture")
    return box


def number(value: object) -> float | None:
    """JSON numbers, and plain decimals in quotes, which models write too."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?(\d{1,9}(\.\d{0,9})?|\.\d{1,9})\s*", value, re.ASCII):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else math.inf


def readable(text: object) -> str:
    """One line without control or formatting letters; lone surrogates, which no file takes, are dropped too."""
    if not isinstance(text, str):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain(text: str) -> str:
    """For comparing prompts: letters and digits alone."""
    return " ".join(re.findall(r"\w+", text.casefold()))
