"""Pictures from a recipe: `python sample.py [recipe] [arguments]`; `python sample.py --help` lists both.

Nothing imported at the top here brings torch, numpy or PIL along: help and mistakes answer at once.
"""

import importlib
import math
import sys
from pathlib import Path

from flux import cli
from flux.errors import UserError

DEFAULT = "t2i"  # the recipe that is meant when the first word is none: python sample.py "a red circle"


def main(argv: list[str]) -> int | None:
    if argv[:1] == ["bench"]:
        return importlib.import_module("flux.bench_plans" if "--random" in argv else "flux.bench").main(argv[1:])
    found = cli.recipes()
    named = argv[0] if argv and argv[0] in found else None
    words = argv[1:] if named else argv
    if cli.wants_help(words):
        print(help_of(named, found) if named else overview(found))
        return None
    picture, words = cli.take(words, "--from")
    name, settings, files = remembered(Path(picture), found) if picture else (named or DEFAULT, {}, {})
    if named and named != name:
        raise UserError(f"--from {picture} was made by {name}, expected {named}; leave out the word {named}")
    command = command_of(name, found)
    try:
        values = cli.parse(words, command, settings)
    except UserError as error:
        near = None if named or not words else cli.nearest(words[0], found, cutoff=0.6)
        if near and not words[0].startswith("-"):
            raise UserError(f"{error}; {words[0]!r} was taken for a prompt, is the recipe {near} meant?") from None
        raise
    instance = cli.build(found[name], command, values)
    print(cli.to_toml(instance), flush=True)
    save(name, instance, files)
    return None


def command_of(name: str, found: dict[str, Path]) -> cli.Command:
    if name not in found:
        raise UserError(f"recipe {name!r} is not here, expected one of {', '.join(found) or 'none'} in {cli.RECIPES}")
    command = cli.describe(found[name]).sample
    if command is None:
        raise UserError(f"{name!r} makes no pictures, expected a recipe that python sample.py --help lists; "
                        f"python train.py {name} --help shows what it trains")
    return command


def help_of(name: str, found: dict[str, Path]) -> str:
    return cli.help_text(f"python sample.py {name} [arguments]", command_of(name, found),
                         [("--from PICTURE", "make a picture again from what its PNG says; flags and --config win")])


def overview(found: dict[str, Path]) -> str:
    """Every recipe that samples with its line, then the flags of the default one."""
    described = {name: cli.describe(path) for name, path in found.items()}
    rows = [(name, recipe.doc) for name, recipe in described.items() if recipe.sample]
    rows.append(("bench", "Times text encoders, transformer and autoencoder, against diffusers where it is installed; "
                          "with --random --model NAME, memory and time of each plan at full size."))
    usage = "usage: python sample.py [recipe] [arguments]"
    text = f"{usage}\n\nRecipes, {DEFAULT} when none is named:\n\n{cli.columns(rows)}"
    return f"{text}\n\n{help_of(DEFAULT, found)}" if DEFAULT in found else text


def remembered(picture: Path, found: dict[str, Path]) -> tuple[str, dict, dict]:
    """(recipe, settings, files) from a picture's metadata, which anyone may have written: none is believed unchecked.

    The folder it was saved in is not taken over: `out` is the user's to say.
    """
    from flux import pictures  # brings PIL

    metadata = pictures.read_metadata(picture)
    name, settings = metadata.get("recipe"), metadata.get("config")
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise UserError(f"--from {picture} does not say how it was made, expected a PNG of sample.py; "
                        "pictures saved with --no-metadata or by other programs cannot be made again")
    if name not in found:
        raise UserError(f"--from {picture} was made by {name!r}, expected a recipe of {', '.join(found)}; add its file")
    files = metadata.get("files")
    return name, {key: value for key, value in settings.items() if key != "out"}, files if isinstance(files, dict) else {}


def save(name: str, instance, files: dict) -> None:
    """Writes every (PIL image, metadata) of `instance.images()`, the configuration, and a contact sheet of several.

    `metadata["before"]`, if there, is a picture that goes into the sheet alone, before the other.

    `metadata["seed"]` goes into the file's name and `metadata["prompt"]`, if there, under the picture in the sheet.
    `metadata["config"]`, if there, is the instance that makes this one picture alone; it stands in for `instance` in
    what `--from` reads. `metadata["sheet"]`, if there, is a picture of how it came about, which is written beside it.
    One warning where `metadata["files"]` are not those that were remembered as `files`.
    """
    from flux import pictures

    pils, prompts, first, paired = [], [], None, False
    for pil, metadata in instance.images():
        config = cli.as_dict(metadata.get("config", instance))
        sheet, before = metadata.pop("sheet", None), metadata.pop("before", None)
        config.pop("out")  # where a picture lies is no part of how it is made, and may name its owner
        path = pictures.next_path(instance.out, metadata["seed"])
        pictures.write_png(path, pil, {**metadata, "recipe": name, "config": config} if instance.metadata else None)
        print(path, flush=True)
        if sheet:
            pictures.write_png(path.with_name(f"{path.stem}_steps.png"), sheet, None)
        if first is None:
            first = path
            changed = [part for part, mark in metadata.get("files", {}).items() if files.get(part, mark) != mark]
            if changed:
                print(f"warning: {', '.join(changed)} changed since the picture was made", file=sys.stderr)
            cli.write_toml(path.with_suffix(".toml"), instance, f"python sample.py {name} --config {path.stem}.toml")
        pils += [pil] if before is None else [before, pil]
        prompts += [metadata.get("prompt", "")] if before is None else ["before", metadata.get("prompt", "")]
        paired = before is not None
    if len(pils) > 1:
        sheet = first.with_name(f"{first.stem}_sheet.png")
        captions = prompts if len(set(prompts)) > 1 else None  # one prompt needs no repeating
        pictures.write_png(sheet, pictures.contact_sheet(pils, 2 * paired or math.ceil(len(pils) ** 0.5), captions), None)
        print(sheet)


if __name__ == "__main__":
    cli.run(main)
