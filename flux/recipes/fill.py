"""Fill: a part of a picture painted anew, or a picture continued beyond its edges, as words say.

The model is given the picture with what the mask hides, and the mask (`flux/fill.py`); all else is text to image.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from flux.errors import UserError
from flux.repaint import Repaint

SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Fill(Repaint):
    """A picture with a part painted anew (--mask), or with more around it (--expand)."""

    expand: tuple[str, ...] = ()  # SIDE=PIXELS to paint beyond an edge, as left=64; may be repeated, or left=64,right=64

    def __post_init__(self):
        super().__post_init__()
        self.outpaint  # noqa: B018  checks it

    @property
    def outpaint(self) -> str | None:
        """left,top,right,bottom in pixels, as t2i takes them."""
        added = dict.fromkeys(SIDES, "0")
        for word in (word for words in self.expand for word in words.split(",")):
            side, _, pixels = word.strip().partition("=")
            if side not in SIDES or not re.fullmatch("[0-9]{1,4}", pixels) or added[side] != "0":
                raise UserError(f"--expand {word!r}: expected each of {', '.join(SIDES)} at most once with its pixels; "
                                "write it as left=64")
            added[side] = pixels
        return ",".join(added.values()) if self.expand else None

    def images(self) -> Iterator[tuple[Image.Image, dict]]:
        if not self.mask and not self.expand:
            raise UserError("fill came without --mask and --expand, expected what to paint; add --mask MASK, white where it "
                            "is painted, or --expand left=64")
        yield from self.drawn(self.request[1:], outpaint=self.outpaint)


SAMPLE = Fill
