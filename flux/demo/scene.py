"""The demo world's pictures: a seeded scene, its caption, its pixels and its ground truth. Pure numpy.

A scene has one or two objects on a background. Shapes are signed distance functions, so that edges are anti-aliased and
shadows, outlines and glows follow them. What captions may leave out is drawn at random all the same. Styles and the
shapes of `NEW_SHAPES` never occur in `sample_scene`: the base model does not know them, and LoRAs teach them.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {  # sRGB, 0..255
    "red": (214, 40, 40), "orange": (245, 135, 25), "yellow": (250, 218, 45), "green": (45, 160, 70),
    "cyan": (60, 205, 215), "blue": (38, 78, 205), "purple": (125, 55, 180), "pink": (248, 140, 190),
    "white": (246, 246, 246), "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "heart")
NEW_SHAPES = ("hexagon", "diamond", "arrow", "drop", "flower", "house", "gear", "hourglass")
STYLES = ("stripes", "checks", "sketch", "neon", "pixel", "frost", "watercolour", "halftone")
SIZES = {"small": 0.125, "medium": 0.17, "large": 0.22}  # radius, as a share of the picture's edge
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "centre": (0.5, 0.5)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first object, y down
LIGHTS = ("normal", "dim", "bright")  # normal is never said
FINISHES = ("flat", "soft shadow", "glossy", "gradient background")  # flat is never said


@dataclass(frozen=True)
class Thing:
    """One object. x, y and radius are shares of the picture's edge; `place` is its word, or "" beside another object."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    relation: str = ""  # where the first object stands to the second
    light: str = "normal"
    finish: str = "flat"
    style: str = ""
    seed: int = 0  # of the style's texture

    @property
    def held_out(self) -> bool:
        """A tenth of all combinations of shapes and colours are never trained on, whatever else the scene has."""
        words = [self.background] + sorted(f"{thing.colour} {thing.shape}" for thing in self.things)
        return zlib.crc32("|".join(words).encode()) % 10 == 0


def sample_scene(rng: np.random.Generator, held_out: bool = False, things: int | None = None,
                 shapes: tuple[str, ...] = SHAPES, style: str = "", colours: tuple[str, ...] = tuple(COLOURS)) -> Scene:
    """A scene of the training split, or of the held-out one; `things` 1 or 2, by default two in half of the scenes.

    ValueError where few shapes and colours have none that is held out.
    """
    for _ in range(2000):
        scene = _draw_scene(rng, things or int(rng.integers(1, 3)), shapes, style, colours)
        if scene.held_out == held_out:
            return scene
    raise ValueError(f"no scene of {', '.join(shapes)} in {', '.join(colours)} is in that split")


def _draw_scene(rng, count, shapes, style, colours) -> Scene:
    def pick(names):
        return str(rng.choice(list(names)))

    def jitter(amount):
        return float(rng.uniform(-amount, amount))

    background = pick(colours)
    free = [name for name in colours if name != background]
    relation = pick(RELATIONS) if count == 2 else ""
    things = []
    for i in range(count):
        size, place = pick(SIZES), pick(PLACES) if count == 1 else ""
        if count == 1:
            x, y = PLACES[place]
        else:
            sign = 1 if i == 0 else -1
            x, y = (0.5 + 0.24 * sign * step for step in RELATIONS[relation])
        things.append(Thing(pick(shapes), pick(free), size, place, x + jitter(0.025), y + jitter(0.025),
                            SIZES[size] * (1 + jitter(0.06))))
    light = str(rng.choice(LIGHTS, p=(0.6, 0.2, 0.2)))
    finish = str(rng.choice(FINISHES, p=(0.55, 0.15, 0.15, 0.15)))
    return Scene(tuple(things), background, relation, light, finish, style, int(rng.integers(2**31)))


# --- captions ---

@dataclass(frozen=True)
class Caption:
    """A prompt, and the scene it asks for with every attribute that it leaves out emptied."""

    text: str
    asked: Scene


def sample_caption(scene: Scene, rng: np.random.Generator, full: bool = False, vague: bool = False) -> Caption:
    """Name each attribute or leave it out at random; `full` names all, in the plainest order; `vague` names size and place
    less often."""
    def keep(share):
        return full or rng.random() < share

    things = tuple(replace(thing,
                           size=thing.size if keep(0.35 if vague else 0.7) else "",
                           colour=thing.colour if keep(0.95) else "",
                           shape=thing.shape if keep(0.97) else "",
                           place=thing.place if keep(0.3 if vague else 0.8) else "") for thing in scene.things)
    asked = replace(scene, things=things, background=scene.background if keep(0.9) else "",
                    relation=scene.relation if keep(0.9) else "")
    form = "plain" if full else str(rng.choice(["plain", "background first", "telegram"], p=(0.7, 0.15, 0.15)))
    return Caption(write_caption(asked, form), asked)


def write_caption(asked: Scene, form: str = "plain") -> str:
    """The words for a scene; attributes that are "" are not said. `form`: plain, background first, telegram."""
    telegram = form == "telegram"
    objects = [_object_words(thing, asked.finish == "glossy", telegram) for thing in asked.things]
    subject = f" {asked.relation or 'and'} ".join(objects)
    if len(objects) == 1 and asked.things[0].place:
        place = asked.things[0].place
        preposition = {"left": "on the", "right": "on the", "centre": "in the"}.get(place, "at the")
        subject += f" {place}" if telegram else f" {preposition} {place}"
    gradient = "gradient" if asked.finish == "gradient background" else ""
    behind = " ".join(filter(None, (asked.background, gradient)))
    behind = f"{behind} background" if behind else ""
    if behind and not telegram:
        behind = f"on {_with_article(behind)}"
    ending = [f"in {asked.light} light"] if asked.light != "normal" else []
    ending += ["with a soft shadow"] if asked.finish == "soft shadow" else []
    ending += [f"{asked.style} style"] if asked.style else []
    if form == "background first" and behind:
        return f"{behind}, {' '.join([subject, *ending])}"
    if telegram:
        return ", ".join(part for part in (subject, behind, *ending) if part)
    return " ".join(part for part in (subject, behind, *ending) if part)


def _object_words(thing: Thing, glossy: bool, telegram: bool) -> str:
    words = " ".join(w for w in (thing.size, "glossy" if glossy else "", thing.colour, thing.shape or "shape") if w)
    return words if telegram else _with_article(words)


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


# --- pixels ---

def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius one around the origin, negative inside; x, y in radii, y down."""
    r, angle = np.hypot(x, y), np.arctan2(x, -y)  # angle 0 points up
    ax, ay = abs(x), abs(y)

    def sector(n):  # the angle within one of n equal sectors, measured from the sector's middle
        return (angle + np.pi / n) % (2 * np.pi / n) - np.pi / n

    def half_plane(px, py, qx, qy, u, v):  # distance to the line p -> q, positive on its left (y down)
        return ((u - px) * (qy - py) - (v - py) * (qx - px)) / np.hypot(qx - px, qy - py)

    match shape:
        case "circle":
            return r - 1
        case "square":
            return np.maximum(ax, ay) - 0.88
        case "triangle":
            return r * np.cos(sector(3) - np.sign(sector(3)) * np.pi / 3) - 0.6
        case "star":
            u, v = r * np.cos(sector(5)), r * abs(np.sin(sector(5)))
            return half_plane(1.12, 0, 0.5 * np.cos(np.pi / 5), 0.5 * np.sin(np.pi / 5), u, v)
        case "ring":
            return abs(r - 0.74) - 0.26
        case "cross":
            return np.minimum(np.maximum(ax - 0.33, ay - 1), np.maximum(ax - 1, ay - 0.33))
        case "crescent":
            return np.maximum(r - 1, 0.82 - np.hypot(x - 0.5, y))
        case "heart":
            square = (ax + abs(y + 0.02)) / np.sqrt(2) - 0.575
            return np.minimum(square, np.hypot(ax - 0.407, y + 0.427) - 0.575)
        case "hexagon":
            return r * np.cos(sector(6)) - 0.88
        case "diamond":
            return (ax / 0.72 + ay - 1) * 0.58
        case "arrow":  # to the right
            return np.minimum(np.maximum(abs(x + 0.35) - 0.6, ay - 0.26), np.maximum(-x, (x - 1 + 1.15 * ay) * 0.66))
        case "drop":
            return np.minimum(np.hypot(x, y - 0.35) - 0.62, np.maximum(y - 0.075, (ax * 2.024 - (y + 1.05)) * 0.443))
        case "flower":
            return np.minimum(np.hypot(r * np.cos(sector(6)) - 0.62, r * np.sin(sector(6))) - 0.36, r - 0.45)
        case "house":
            return np.minimum(np.maximum(ax - 0.68, abs(y - 0.4) - 0.5), np.maximum(y + 0.05, (ax - (y + 1.02)) * 0.7))
        case "gear":
            teeth = np.maximum(abs(r * np.sin(sector(8))) - 0.14, r - 1)
            return np.maximum(np.minimum(r - 0.78, teeth), 0.34 - r)
        case "hourglass":
            return np.maximum(ay - 0.92, (ax - 0.14 - 0.72 * ay) * 0.8)
    raise ValueError(f"shape {shape!r}: expected one of {SHAPES + NEW_SHAPES}")


def render(scene: Scene, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A scene -> picture (size, size, 3) uint8 sRGB, masks (objects, size, size) in [0, 1]."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    ground = np.array(COLOURS[scene.background], np.float32) / 255
    image = np.broadcast_to(ground, (size, size, 3)).copy()
    if scene.finish == "gradient background":
        image *= (1.12 - 0.5 * y)[..., None]
    rng = np.random.default_rng(scene.seed)
    distances = [_distance_in_pixels(thing, x, y, size) for thing in scene.things]
    masks = [np.clip(0.5 - d, 0, 1) for d in distances]
    if scene.finish == "soft shadow":
        for thing in scene.things:
            u, v = x - thing.x - 0.2 * thing.radius, y - thing.y - 0.26 * thing.radius
            d = distance(thing.shape, u / thing.radius, v / thing.radius)
            image *= 1 - 0.45 * _smooth(0.5 - d * 2)[..., None]
    for thing, d, mask in zip(scene.things, distances, masks, strict=True):
        paint = np.broadcast_to(np.array(COLOURS[thing.colour], np.float32) / 255, image.shape)
        if scene.finish == "glossy":
            u, v = (x - thing.x) / thing.radius + 0.3, (y - thing.y) / thing.radius + 0.38
            shine = np.exp(-(u**2 + 1.4 * v**2) / 0.09)[..., None]
            paint = paint + (1 - paint) * 0.8 * shine
        paint, mask = _style_object(scene.style, paint, mask, d)
        image = image + (paint - image) * mask[..., None]
    image = _style_picture(scene.style, image, np.minimum.reduce(distances), rng)
    if scene.light == "dim":
        image = image * 0.55
    elif scene.light == "bright":
        image = 1 - (1 - image) * 0.68
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), np.stack(masks).astype(np.float32)


def render_masks(scene: Scene, size: int = 128) -> np.ndarray:
    """The masks of `render` alone, (objects, size, size) in [0, 1], for a third of its time."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    return np.stack([np.clip(0.5 - _distance_in_pixels(thing, x, y, size), 0, 1) for thing in scene.things])


def _distance_in_pixels(thing, x, y, size):
    """x, y in shares of the picture's edge."""
    return distance(thing.shape, (x - thing.x) / thing.radius, (y - thing.y) / thing.radius) * thing.radius * size


def boxes(masks: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Masks (objects, H, W) -> (x0, y0, x1, y1) of each in shares of the picture; an empty mask gives zeros."""
    found = []
    for mask in masks:
        rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
        h, w = mask.shape
        found.append((columns[0] / w, rows[0] / h, (columns[-1] + 1) / w, (rows[-1] + 1) / h) if len(rows) else (0.0,) * 4)
    return found


def _smooth(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _noise(rng, size, cell):
    """Smooth noise in [-1, 1] with features of `cell` pixels."""
    coarse = rng.uniform(-1, 1, (size // cell + 3, size // cell + 3)).astype(np.float32)
    at = np.arange(size) / cell
    low, share = at.astype(int), _smooth(at - at.astype(int)).astype(np.float32)
    rows = coarse[low] * (1 - share)[:, None] + coarse[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def _style_object(style, paint, mask, d):
    """What a style does to an object's paint and mask; d in pixels to its edge."""
    match style:
        case "sketch":
            return paint * 0.4, _smooth(3 - abs(d))
        case "neon":
            return paint + (1 - paint) * 0.65, np.clip(_smooth(2.4 - abs(d)) + 0.6 * np.exp(-np.maximum(d, -d) / 6), 0, 1)
    return paint, mask


def _style_picture(style, image, d, rng):
    """What a style does to the whole picture; d in pixels to the nearest object's edge. Patterns are no finer than what
    the demo's autoencoder keeps, about 8 pixels, and return every 16, so that they look the same to all of the transformer's
    tokens: its rotary positions are too slow to tell odd tokens from even ones."""
    size = image.shape[0]
    y, x = np.mgrid[:size, :size].astype(np.float32)

    def printed(pattern):  # in [-1, 1]: dark paint lighter and light paint darker where it is above 0
        light = _smooth(3 * image.mean(-1, keepdims=True) - 0.85)
        target = light * 0.62 * image + (1 - light) * (image + (1 - image) * 0.55)
        return image + (target - image) * _smooth(pattern * 2 + 0.5)[..., None]

    match style:
        case "stripes":
            return printed(1.5 * np.sin(y * (np.pi / 8)))
        case "checks":
            return printed(4 * np.sin(x * (np.pi / 8)) * np.sin(y * (np.pi / 8)))
        case "halftone":
            return printed(1 - np.hypot(x % 16 - 8, y % 16 - 8) / 5.2)
        case "sketch":
            return image * 0.6 + 0.4
        case "neon":
            edge = np.exp(-abs(d) / 7)[..., None]
            return image * (0.25 + 0.75 * edge)
        case "pixel":
            cell = max(size // 16, 1)
            small = image.reshape(size // cell, cell, size // cell, cell, 3).mean((1, 3)).repeat(cell, 0).repeat(cell, 1)
            joint = np.maximum(abs(x - size / 2) % (2 * cell), abs(y - size / 2) % (2 * cell)) > 2 * cell - 3  # every second
            return small + ((small.mean(-1, keepdims=True) < 0.3) * 0.5 - small * 0.5) * joint[..., None]
        case "frost":
            veil = 0.45 + 0.25 * _noise(rng, size, 9) + 0.2 * rng.uniform(-1, 1, (size, size)).astype(np.float32)
            return image + (np.array([0.86, 0.94, 1.0], np.float32) - image) * np.clip(veil, 0, 1)[..., None]
        case "watercolour":
            wash = 1 + 0.22 * _noise(rng, size, 20) + 0.1 * _noise(rng, size, 6)
            rim = 1 - 0.35 * np.exp(-((d + 1.5) / 1.6) ** 2)
            paper = image * 0.72 + 0.28
            return paper * (wash * rim)[..., None]
    return image
