"""Which prompts an iteration learns from, and which it never sees. The demo has captions of its own, with what they ask."""

from collections.abc import Sequence
from pathlib import Path

from flux import draws
from flux.demo import scene as world
from flux.demo.scene import Caption
from flux.errors import UserError


def of_file(path: Path) -> list[str]:
    """One a line, # starts a comment; a prompt that comes twice counts once."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file; expected one prompt a line; check the name")
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UserError(f"--prompts {path} holds no prompt, expected one a line; fill it")
    return found


def captions(seed: int, name: str, count: int, held_out: bool, without: Sequence[str] = ()) -> list[Caption]:
    """Of the demo world, each once; those of held-out scenes were never trained on, neither by the base model."""
    rng, made = draws.rng("artaug captions", seed, name), {}
    while len(made) < count:
        caption = world.sample_caption(world.sample_scene(rng, held_out=held_out), rng)
        if caption.text not in without:
            made.setdefault(caption.text, caption)
    return list(made.values())


def of_iteration(settings, iteration: int) -> list[str]:
    """The next `count` prompts: of the file, whose last tenth is kept for checks, or of the demo's training scenes."""
    first = (iteration - 1) * settings.count
    if settings.prompts is None:
        if settings.model.partition("-")[0] != "demo":
            raise UserError("--prompts is missing, expected a file with one prompt a line; only the demo has captions")
        return [caption.text for caption in captions(settings.seed, "train", first + settings.count, False)][first:]
    found = of_file(settings.prompts)
    own = found[:len(found) - len(found) // 10][first:first + settings.count]
    if len(own) < settings.count:
        raise UserError(f"--prompts {settings.prompts} has {len(found)} prompts, a tenth of them kept for checks; expected "
                        f"{first + settings.count} for iteration {iteration}: add some, or take a smaller --count")
    return own


def for_checks(settings, count: int) -> list[Caption]:
    """Prompts that no iteration learns from; beside those of the demo stands what they ask, beside others nothing."""
    if settings.prompts is None:
        return captions(settings.seed, "check", count, True)
    found = of_file(settings.prompts)
    return [Caption(prompt, None) for prompt in found[len(found) - len(found) // 10:][:count]]
