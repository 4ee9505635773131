"""Commands that begin with a picture and words, `python sample.py RECIPE PICTURE "words"`, and draw as t2i does."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image

from flux import cli, pictures
from flux.errors import UserError
from flux.settings import Sampling


@dataclass(frozen=True)
class Repaint(Sampling):
    """Settings of commands that change a picture."""

    request: tuple[str, ...] = ()  # the picture, then what to draw; several prompts make several pictures
    model: str = "demo-fill"  # a preset that takes a mask: demo-fill, fill; or dev with a LoRA that makes it one
    mask: Path | None = None  # grey picture as large as the first: white changes, black is known
    hold: bool = True  # lead known latents straight to the picture's own; --no-hold leaves them to the model, as released
    keep: bool = False  # put known pixels back, byte for byte
    batch: int = 4  # pictures that go through the transformer together; changes speed and memory, not the pictures
    POSITIONAL = "request"

    def picture(self) -> Path:
        if not self.request or len(self.request[0]) > 4096 or not Path(self.request[0]).is_file():
            came = f"{self.request[0][:80]!r} is no file" if self.request else "no picture came"
            raise UserError(f'{came}, expected a picture and then words; write them as photo.png "a red hat"')
        return Path(self.request[0])

    def drawn(self, prompts: tuple[str, ...], **more) -> Iterator[tuple[Image.Image, dict]]:
        """By t2i, with the flags that both have and `more` of its own; the metadata remember this command, and carry the
        picture `before` for the sheet."""
        picture, t2i = self.picture(), cli.recipes()["t2i"]
        command = cli.describe(t2i).sample
        theirs = {field.name for field in command.fields}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name in theirs}
        made = cli.build(t2i, command, own | {"prompt": prompts, "image": picture} | more)
        before = pictures.read(picture)
        words = [word for word in self.request[1:] or ("",) for _ in range(self.num)]
        for word, (pil, metadata) in zip(words, made.images(), strict=True):
            alone = replace(self, request=(str(picture), word), num=1, seed=metadata["seed"])
            yield pil, metadata | {"config": alone, "before": before}
