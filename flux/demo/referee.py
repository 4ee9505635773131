"""The demo world's referee: does a picture show what its caption asks for? It reads pixels; nothing trains on it.

It undoes `scene.render` step by step, with room for the blur, noise and tint that an autoencoder and a sampler leave:

    backgrounds   the border -> (light, colour, gradient); from here on that light is undone, colours are the palette's
    explain       the ground under the objects, its shadows, and the pieces that differ from both, one colour each
    recognise     a piece against the templates of `scene.distance`: centre and radius by Gauss-Newton, then overlap
    compare       one bool per attribute that the caption names

`python -m flux.demo.trial` measures the referee on pictures whose truth is known. Places and radii are shares of the
picture's edge where nothing else is said, colours are in [0, 1], distances between colours are Euclidean.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np

from flux.demo import masks
from flux.demo.scene import (
    COLOURS,
    LIGHTS,
    NEW_SHAPES,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    distance,
)

PALETTE = {name: np.array(rgb, np.float32) / 255 for name, rgb in COLOURS.items()}
GAIN = {"normal": 1.0, "dim": 0.55, "bright": 0.68}  # what a light leaves of contrast

# Distances between colours in normal light. The palette's closest pair is 0.33 apart, 0.23 with a shadow on one.
BORDER_TOLERANCE = 0.10  # of the median border pixel, in the picture's own light
RIVAL = 0.07  # what a worse background may cost more and still be tried: black may be dim, white may be bright
FOREGROUND = 0.11  # from the ground and all its shadows
FAINT = 0.16  # a piece that differs less from the ground is a stain
COLOUR_TOLERANCE = 0.22  # from a name's colour, which must also be half of that from any other
MIXED = 0.10  # from a mixture of two colours, to be one

SPECK = 0.0022  # share of the picture; the least of all objects covers four times as much
MIN_IOU, MIN_MARGIN = 0.8, 0.04  # with a shape's template, and over the next best shape's
OUTLINE_PIXELS, OUTLINE_SHARE = 0.5, 0.02  # how far the outline may be astray on average: of 128 pixels, of the radius
PLACE_TOLERANCE = 0.13  # a little more than half the way from the centre to a side
MIN_STEP = 0.2  # between the centres of two objects that stand in a relation; the renderer leaves 0.43 to 0.53


@dataclass(frozen=True)
class Found:
    """One object in a picture. `shape` and `colour` are "" where nothing matches well; box is x0, y0, x1, y1."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    box: tuple[float, float, float, float]
    iou: float  # with the best template, [0, 1]: how sure the shape is
    margin: float  # to the next best shape's
    glossy: bool


@dataclass(frozen=True)
class Seen:
    """What a picture shows; background "" where the border is no colour of the palette."""

    background: str
    light: str
    finish: str
    things: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """`held` maps each asked attribute to whether the picture shows it: "objects" (their number), "background",
    "shape 1", "colour 1", "place 1", "size 1", "shape 2", ..., "relation", "light", "finish"."""

    seen: Seen
    held: dict[str, bool]

    @property
    def right(self) -> bool:
        """Number of objects, shapes, colours, places and relation; size, light and finish are told, not demanded."""
        return all(held for name, held in self.held.items() if name.split()[0] not in ("size", "light", "finish"))


# --- the verdict ---

def judge(pixels: np.ndarray, asked: Scene) -> Verdict:
    """Pixels (H, W, 3) uint8 against a `Caption.asked`. What the caption leaves out is not judged, nor is the style.

    A shadow on black and a highlight on white cannot be seen: such a finish is told as "flat".
    """
    new = any(thing.shape in NEW_SHAPES for thing in asked.things)
    return compare(look(pixels, len(asked.things), SHAPES + NEW_SHAPES if new else SHAPES), asked)


def compare(seen: Seen, asked: Scene) -> Verdict:
    """Two objects are matched to the seen ones in the way that is best for the caption, but one way for everything."""
    held = {"objects": len(seen.things) == len(asked.things)}
    if asked.background:
        held["background"] = seen.background == asked.background
    if asked.light != "normal":
        held["light"] = seen.light == asked.light
    if asked.finish != "flat":
        held["finish"] = seen.finish == asked.finish
    orders = permutations(seen.things) if held["objects"] else [(None,) * len(asked.things)]
    verdicts = [Verdict(seen, held | _compare(order, asked)) for order in orders]
    return max(verdicts, key=lambda verdict: (verdict.right, sum(verdict.held.values())))


def _compare(order: tuple[Found | None, ...], asked: Scene) -> dict[str, bool]:
    """The objects' attributes and their relation, for seen objects in the asked ones' order; None is no object."""
    held = {}
    for i, (found, thing) in enumerate(zip(order, asked.things, strict=True), 1):
        for name in ("shape", "colour", "size"):
            if getattr(thing, name):
                held[f"{name} {i}"] = found is not None and getattr(found, name) == getattr(thing, name)
        if thing.place:
            held[f"place {i}"] = found is not None and place_of(found.x, found.y) == thing.place
    if asked.relation:
        first, second = order
        held["relation"] = first is not None and relation_of(first, second) == asked.relation
    return held


def place_of(x: float, y: float) -> str:
    """The word for a centre, "" between two places."""
    gap, name = min((np.hypot(x - px, y - py), name) for name, (px, py) in PLACES.items())
    return name if gap <= PLACE_TOLERANCE else ""


def relation_of(first: Found, second: Found) -> str:
    """Where the first object stands to the second, "" where they are too close to tell."""
    x, y = first.x - second.x, first.y - second.y
    step, name = max((x * u + y * v, name) for name, (u, v) in RELATIONS.items())
    return name if step >= MIN_STEP else ""


# --- the picture ---

@dataclass(frozen=True)
class View:
    """A picture under one explanation of its border; pixels and ground (H, W, 3) are in normal light."""

    light: str
    background: str
    gradient: bool
    shadow: bool
    pixels: np.ndarray
    ground: np.ndarray
    pieces: tuple["Piece", ...]
    misfit: float  # of the border and of the pieces' colours, in the picture's own light


@dataclass(frozen=True)
class Piece:
    """A connected piece of one colour. Arrays (H, W): which pixels, how much each is covered, which may be judged."""

    mask: np.ndarray
    cover: np.ndarray
    clear: np.ndarray  # False where another object is, or may hide this one
    rgb: np.ndarray
    colour: str
    gap: float  # from rgb to the palette's colour
    contrast: float  # from rgb to the ground


def look(pixels: np.ndarray, things: int, shapes: tuple[str, ...] = SHAPES) -> Seen:
    """What is in a picture (H, W, 3) uint8, from 96 pixels. All objects are reported, however many are expected.

    `things` decides one case: where two are expected and one piece that is no shape is found, it is cut in two.
    """
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
    image = pixels.astype(np.float32) / 255
    views = [explain(image, *hypothesis) for hypothesis in backgrounds(image)]
    if not views:
        return Seen("", "normal", "flat", ())
    view = min(views, key=lambda view: view.misfit)
    found = [recognise(view, piece, shapes) for piece in view.pieces]
    if things == 2 and len(found) == 1 and not found[0].shape:
        halves = [recognise(view, half, shapes) for half in cut(view.pieces[0])]
        if all(half.shape for half in halves):
            found = halves
    if view.gradient:
        finish = "gradient background"
    elif any(thing.glossy for thing in found):
        finish = "glossy"
    else:
        finish = "soft shadow" if view.shadow else "flat"
    return Seen(view.background, view.light, finish, tuple(found))


@cache
def _border(height: int, width: int) -> tuple[np.ndarray, np.ndarray, list, np.ndarray]:
    """Rows and columns (n,) of a ring near the border, the 60 hypotheses, and their colours there (60, n, 3)."""
    y, x = np.mgrid[:height, :width]
    ring = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x)) == height // 64
    rows, columns = np.nonzero(ring)
    hypotheses = [(light, name, gradient) for light in LIGHTS for name in COLOURS for gradient in (False, True)]
    colours = [shine_on(_plain_ground(name, gradient, height)[rows, 0], light) for light, name, gradient in hypotheses]
    return rows, columns, hypotheses, np.clip(np.stack(colours), 0, 1)


def _plain_ground(name: str, gradient: bool, height: int) -> np.ndarray:
    """A background's rows (H, 1, 3) before light falls on it."""
    y = (np.arange(height, dtype=np.float32)[:, None, None] + 0.5) / height
    return PALETTE[name] * (1.12 - 0.5 * y if gradient else np.ones_like(y))


def shine_on(image: np.ndarray, light: str) -> np.ndarray:
    return image * 0.55 if light == "dim" else 1 - (1 - image) * GAIN[light]


def undo_light(image: np.ndarray, light: str) -> np.ndarray:
    return image / 0.55 if light == "dim" else 1 - (1 - image) / GAIN[light]


def backgrounds(image: np.ndarray) -> list[tuple[str, str, bool, float]]:
    """The (light, colour, gradient, misfit) that explain the border, best first, with rivals that are about as good."""
    rows, columns, hypotheses, colours = _border(*image.shape[:2])
    gaps = np.linalg.norm(image[rows, columns] - colours, axis=-1)  # (60, n)
    misfits, middles = np.minimum(gaps, 0.2).mean(1), np.median(gaps, axis=1)
    best = misfits.min()
    likely = [i for i in np.argsort(misfits) if middles[i] < BORDER_TOLERANCE and misfits[i] < best + RIVAL]
    return [(*hypotheses[i], float(misfits[i])) for i in likely[:3]]


def explain(image: np.ndarray, light: str, background: str, gradient: bool, misfit: float) -> View:
    """Undo the light, take the ground and its shadows away, and cut what is left into pieces."""
    pixels = undo_light(image, light)
    scale = (len(image) / 128) ** 2  # pixels for one of the usual picture
    ground = _ground(pixels, background, gradient, light)
    smooth = masks.mean(pixels)
    shade = np.clip(masks.dot(smooth, ground) / np.maximum(masks.dot(ground, ground), 1e-3), 0.5, 1)
    foreground = masks.norm(smooth - shade[..., None] * ground) > FOREGROUND
    dark = ~foreground & (shade < 0.88) & (masks.norm(smooth - ground) > 0.07)
    black = (foreground & (masks.norm(smooth - PALETTE["black"]) < 0.3)).sum() > 20 * scale
    band = masks.erode(masks.erode(dark)) if black else masks.erode(dark)  # a black object's soft edge is like a shadow
    shadow = not gradient and bool(band.sum() > (3 if black else 10) * scale)
    if shadow:
        ground = ground * shade[..., None]
    pieces = _pieces(pixels, smooth, ground, foreground, [name for name in COLOURS if name != background], scale)
    misfit += GAIN[light] * sum(min(piece.gap, 0.3) for piece in pieces)
    return View(light, background, gradient, shadow, pixels, ground, pieces, misfit)


def _ground(pixels: np.ndarray, background: str, gradient: bool, light: str) -> np.ndarray:
    """The background under the objects, (H, W, 3): the palette's, moved to where the picture's own lies.

    The move is a straight line over the rows, fitted twice to the pixels that are near, in every third column.
    """
    width, pixels = pixels.shape[1], pixels[:, ::3]
    ground = np.minimum(_plain_ground(background, gradient, len(pixels)), 1 / 0.55 if light == "dim" else 1)
    y = np.linspace(-1, 1, len(pixels), dtype=np.float32)[:, None]
    for tolerance in (0.17, 0.1):
        away = pixels - ground
        near = masks.norm(away) < tolerance
        count = near.sum(1, keepdims=True)
        total = np.where(near[..., None], away, 0).sum(1)  # (H, 3)
        normal = np.array([[count.sum() + 1, (count * y).sum()], [(count * y).sum(), (count * y * y).sum() + 1]])
        level, slope = np.linalg.solve(normal, np.stack((total.sum(0), (total * y).sum(0))))
        ground = ground + (level + slope * y)[:, None].astype(np.float32)
    return np.broadcast_to(ground, (len(ground), width, 3))


def _pieces(pixels, smooth, ground, foreground, names, scale) -> tuple[Piece, ...]:
    """Pieces larger than a speck: of one colour each, and then what has no clear colour."""
    label = np.full(foreground.shape, -1)  # of the nearest colour
    if foreground.any():
        label[foreground] = np.argmin([_paint_gap(pixels[foreground], PALETTE[name]) for name in names], axis=0)
    _settle_edges(label, pixels, smooth, ground, scale)
    _settle_highlights(label, pixels, smooth, scale)
    solid = _solid(label, scale)
    pieces, rest = [], foreground
    for i, thick in solid.items():
        clear = ~masks.dilate(np.isin(label, [j for j in solid if j != i])) | (label == i)
        mask, shiny = _covered(label == i, thick, pixels, ground)
        pieces += [_piece(pixels, ground, piece, clear, shiny, names)
                   for piece in masks.components(mask) if (piece & thick).any()]
        rest = rest & ~masks.dilate(label == i, 2)
    nothing = np.zeros_like(rest)
    pieces += [_piece(pixels, ground, piece, ~nothing, nothing, names) for piece in masks.components(masks.erode(rest))]
    return tuple(piece for piece in pieces if piece.mask.sum() > SPECK * piece.mask.size and piece.contrast > FAINT)


def _covered(labelled, thick, pixels, ground) -> tuple[np.ndarray, np.ndarray]:
    """Of the pixels of one label: those that the object covers by more than half, and those in a highlight.

    A highlight may look like ground that shines through. It is told from a soft edge by its colour or by lying inside.
    """
    rgb, at, base = np.median(pixels[thick], axis=0), pixels[labelled], ground[labelled]
    cover = _cover(at, base, rgb)
    edge_gap = masks.norm(at - base - cover[:, None] * (rgb - base))
    inside = masks.erode(thick)[labelled]
    mask, shiny = np.zeros_like(labelled), np.zeros_like(labelled)
    shiny[labelled] = (_highlight(at, rgb) > 0.12) & (inside | (_highlight_gap(at, rgb) < edge_gap - 0.05))
    mask[labelled] = cover > 0.5
    return mask | shiny, shiny


def _settle_edges(label, pixels, smooth, ground, scale):
    """Give soft edges, which may have the tint of a third colour, to the colour that they fade out from. In place.

    A mixture with the ground is nearer to it than what is mixed in: so the colours far from the ground come first.
    """
    settled = label < 0
    solid = [(mask, i, np.median(pixels[mask], axis=0)) for i, mask in _solid(label, scale).items()]
    for _, i, rgb in sorted(solid, key=lambda each: -masks.norm(each[2] - ground[each[0]].mean(0))):
        for _ in range(3):  # along thin tips, which are edge all over
            near = masks.dilate(label == i, 5) & (label != i) & ~settled
            if not near.any():
                break
            at, base = smooth[near], ground[near]
            mixed = base + _cover(at, base, rgb)[:, None] * (rgb - base)
            label[near] = np.where(masks.norm(at - mixed) < MIXED, i, label[near])
        settled |= label == i


def _settle_highlights(label, pixels, smooth, scale):
    """Give the highlights of a glossy object to its colour, the largest first. In place."""
    for i, mask in sorted(_solid(label, scale).items(), key=lambda each: -each[1].sum()):
        near = masks.dilate(mask, 5) & (label != i) & (label >= 0)
        at, rgb = smooth[near], np.median(pixels[mask], axis=0)
        highlight = (_highlight_gap(at, rgb) < MIXED) & (_highlight(at, rgb) < 0.72)  # more may be a white object
        label[near] = np.where(highlight, i, label[near])


def _solid(label: np.ndarray, scale: float) -> dict[int, np.ndarray]:
    """Where each label is thicker than an edge, for the labels of which that is some."""
    common = np.flatnonzero(np.bincount(label.ravel() + 1)[1:] > 12 * scale)
    return {int(i): thick for i in common if (thick := masks.erode(label == i)).sum() > 12 * scale}


def _piece(pixels, ground, mask, clear, shiny, names) -> Piece:
    inner = masks.erode(mask)
    rgb = np.median(pixels[inner if inner.any() else mask], axis=0)
    gaps = [float(masks.norm(rgb - PALETTE[name])) for name in names]
    (gap, name), (rival, _) = sorted(zip(gaps, names, strict=True))[:2]
    near, cover = masks.dilate(mask, 4), np.zeros(mask.shape, np.float32)
    cover[near] = _cover(pixels[near], ground[near], rgb)
    cover[mask & shiny] = 1
    return Piece(mask, cover, clear, rgb, name if gap < min(COLOUR_TOLERANCE, rival / 2) else "", gap,
                 float(masks.norm(rgb - ground[mask].mean(0))))


def _cover(pixels, ground, rgb) -> np.ndarray:
    """How much of each pixel something of this colour covers, if the rest is ground, [0, 1]."""
    way = rgb - ground
    return np.clip(masks.dot(pixels - ground, way) / np.maximum(masks.dot(way, way), 1e-3), 0, 1)


def _highlight(pixels: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """How far a glossy object's highlight has moved each pixel from its colour towards white, 0 to 0.8."""
    way = 1 - rgb
    return np.clip(masks.dot(pixels - rgb, way) / np.maximum(masks.dot(way, way), 1e-2), 0, 0.8)


def _highlight_gap(pixels: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Distance from the nearest of a colour's highlights."""
    return masks.norm(pixels - rgb - _highlight(pixels, rgb)[..., None] * (1 - rgb))


def _paint_gap(pixels: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Distance from a colour or, at a charge, from its highlights; without it, white would be a highlight on pink."""
    return np.minimum(masks.norm(pixels - rgb), _highlight_gap(pixels, rgb) + 0.1)


def cut(piece: Piece) -> tuple[Piece, Piece]:
    """Two objects of one colour that touch, parted at the neck across the longer side. Each sees its own half only."""
    rows, columns = np.flatnonzero(piece.mask.any(1)), np.flatnonzero(piece.mask.any(0))
    across = np.ptp(columns) > np.ptp(rows)
    low, high = (columns if across else rows)[[0, -1]]
    from_, to = low + (high - low) * 3 // 8, low + (high - low) * 5 // 8 + 1
    neck = from_ + int(np.argmin(piece.mask.sum(0 if across else 1)[from_:to]))
    at = np.arange(piece.mask.shape[1])[None] if across else np.arange(piece.mask.shape[0])[:, None]
    first = np.broadcast_to(at <= neck, piece.mask.shape)
    return tuple(replace(piece, mask=piece.mask & side, clear=piece.clear & side) for side in (first, ~first))


# --- shapes ---

REACH, STEPS = 1.7, 100  # templates are tables of distances from -REACH to REACH radii, STEPS to a radius


@dataclass(frozen=True)
class Template:
    """Tables (n, n) in radii: the distance to a shape, its slopes along x and y; area, outline, centroid likewise."""

    distance: np.ndarray
    along_x: np.ndarray
    along_y: np.ndarray
    area: float
    outline: float
    x: float
    y: float


@cache
def _template(shape: str) -> Template:
    axis = np.arange(-int(REACH * STEPS), int(REACH * STEPS) + 1, dtype=np.float32) / STEPS
    x, y = np.meshgrid(axis, axis)
    table = distance(shape, x, y).astype(np.float32)
    along_y, along_x = np.gradient(table, 1 / STEPS)
    inside = table < 0
    outline = (abs(table) < 0.05).sum() / STEPS**2 / 0.1  # a band's area over its width
    centroid = float(x[inside].mean()), float(y[inside].mean())
    return Template(table, along_x, along_y, inside.sum() / STEPS**2, outline, *centroid)


def _places(at: np.ndarray, centre: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixels along an axis -> their offsets from the centre in radii, and where these are in a table."""
    offsets = (at + 0.5 - centre) / radius
    places = ((offsets + REACH) * STEPS + 0.5).astype(np.intp)
    return offsets, np.minimum(np.maximum(places, 0), 2 * int(REACH * STEPS))


def _draw(shape: str, x: float, y: float, radius: float, at) -> np.ndarray:
    """A template's cover of the pixels of a window, (rows, columns); lengths in pixels."""
    (_, rows), (_, columns) = _places(at[0], y, radius), _places(at[1], x, radius)
    d = _template(shape).distance[rows[:, None], columns] * radius
    return np.minimum(np.maximum(0.5 - d, 0), 1)


def recognise(view: View, piece: Piece, shapes: tuple[str, ...]) -> Found:
    """The shape that fits best, its place and size; the name is "" if the fit is poor or another shape's is as good."""
    height, width = piece.mask.shape
    rows, columns = np.flatnonzero(piece.mask.any(1)), np.flatnonzero(piece.mask.any(0))
    pad = height // 16
    window = (slice(max(rows[0] - pad, 0), rows[-1] + pad), slice(max(columns[0] - pad, 0), columns[-1] + pad))
    at = np.arange(height)[window[0]], np.arange(width)[window[1]]
    pixels, clear = view.pixels[window], piece.clear[window]
    cover, shine = piece.cover[window] * clear, _highlight(pixels, piece.rgb)
    lit = (shine > 0.12) & (_highlight_gap(pixels, piece.rgb) < 1.5 * MIXED)
    starts = sorted((_begin(shape, cover, clear, at) for shape in shapes), reverse=True)
    fits = sorted((_fit(*start[1:], cover, clear, lit, at) for start in starts[:3]), reverse=True)
    (iou, x, y, radius, shape), margin = fits[0], fits[0][0] - fits[1][0]

    astray = (1 - iou) * _template(shape).area / _template(shape).outline * radius  # of the outline, in pixels
    close = astray <= OUTLINE_PIXELS * height / 128 + OUTLINE_SHARE * radius
    known = close and iou >= MIN_IOU and margin >= MIN_MARGIN
    due = _shine(x, y, radius, at)
    weight = _draw(shape, x, y, radius, at) * clear * due
    glossy = weight.sum() > 4 and (weight * shine).sum() > 0.4 * (weight * due).sum()
    size = min(SIZES, key=lambda name: abs(np.log(radius / height / SIZES[name])))
    box = tuple(float(share) for share in (columns[0] / width, rows[0] / height,
                                           (columns[-1] + 1) / width, (rows[-1] + 1) / height))
    return Found(shape if known else "", piece.colour, size, x / width, y / height, radius / height, box,
                 iou, margin, bool(glossy))


def _shine(x: float, y: float, radius: float, at) -> np.ndarray:
    """Where `scene.render` puts a glossy object's highlight, (rows, columns) in [0, 1]."""
    u, v = (at[1] + 0.5 - x) / radius + 0.3, (at[0][:, None] + 0.5 - y) / radius + 0.38
    return np.exp(-(u**2 + 1.4 * v**2) / 0.09)


def _begin(shape: str, cover: np.ndarray, clear: np.ndarray, at) -> tuple[float, float, float, float, str]:
    """A template with the cover's area and centroid: (IoU, x, y, radius, shape), lengths in pixels."""
    template, (rows, columns) = _template(shape), at
    mass = cover.sum() + 1e-6
    radius = np.sqrt(mass / template.area)
    x = (cover.sum(0) * (columns + 0.5)).sum() / mass - template.x * radius
    y = (cover.sum(1) * (rows + 0.5)).sum() / mass - template.y * radius
    return _overlap(cover, _draw(shape, x, y, radius, at), clear), x, y, radius, shape


def _fit(x, y, radius, shape, cover, clear, lit, at) -> tuple[float, float, float, float, str]:
    """The same after Gauss-Newton on centre and radius; where a highlight is due, `lit` pixels do not count.

    The cover is 1/2 - d / edge, kept between 0 and 1, with d = radius * table((pixel - centre) / radius).
    """
    template, start = _template(shape), radius
    stride = min(max(int(radius / 8), 1), 2)  # large objects have pixels to spare; a wider one steps over a square's side
    rows, columns = coarse = tuple(axis[::stride] for axis in at)
    sharp = np.clip(cover * 2 - 0.5, 0, 1)  # as before a slight blur
    for edge in (4, 3, 2, 2):  # pixels; wide at first, to be drawn in from afar
        (v, i), (u, j) = _places(rows, y, radius), _places(columns, x, radius)
        tables = template.distance, template.along_x, template.along_y
        table, along_x, along_y = (each[i[:, None], j] for each in tables)
        drawn = 0.5 - table * (radius / edge)
        counts = clear[::stride, ::stride] & ~(lit[::stride, ::stride] & (_shine(x, y, radius, coarse) > 0.3))
        ramp = counts * ((drawn > 0) & (drawn < 1)) / edge
        along_radius = u * along_x + v[:, None] * along_y - table
        slopes = (np.stack((along_x, along_y, along_radius)) * ramp).reshape(3, -1)
        away = (sharp[::stride, ::stride] - np.clip(drawn, 0, 1)) * counts
        step = np.linalg.solve(slopes @ slopes.T + 0.5 * np.eye(3), slopes @ away.ravel())
        x, y, radius = np.array((x, y, radius)) + np.clip(step, -4, 4)
        radius = max(radius, start / 2)
    drawn, counts = _draw(shape, x, y, radius, at), clear & ~(lit & (_shine(x, y, radius, at) > 0.3))
    soft = masks.mean(masks.mean(drawn))
    looks = (sharp, drawn), (cover, drawn), (cover, soft), (cover, masks.mean(masks.mean(soft)))  # blurred by up to 1.6
    return max(_overlap(*look, counts) for look in looks), float(x), float(y), float(radius), shape


def _overlap(a: np.ndarray, b: np.ndarray, clear: np.ndarray) -> float:
    """Intersection over union of two soft masks."""
    return float((np.minimum(a, b) * clear).sum() / ((np.maximum(a, b) * clear).sum() + 1e-6))
