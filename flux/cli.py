"""How a recipe's frozen dataclass becomes a command.

A recipe is a file `flux/recipes/NAME.py` that ends with `SAMPLE = Class` and/or `TRAIN = {"stage": Class}`. Each class
is a command: its fields are the flags, the comment on a field's line is the help. The file is read as text (`ast`)
until the flags are known to be right, since running it imports torch: help and mistakes answer at once.

    describe(path) -> Recipe -> parse(argv, command) -> values -> build(path, command, values) -> instance
"""

import ast
import errno
import functools
import importlib
import io
import json
import math
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from flux.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPES = Path(__file__).parent / "recipes"

KINDS = {  # type of a field: how help calls its value, what an error asks for, an example
    "int": ("N", "a whole number", "20"),
    "float": ("X", "a number", "3.5"),
    "str": ("TEXT", "text", '"a red circle"'),
    "Path": ("PATH", "a path", "some/file"),
    "bool": ("", "true or false", "true"),
}


@dataclass(frozen=True)
class Field:
    """One flag. `annotation` and `default` are source text; `default` is None where a value is required."""

    name: str
    annotation: str
    default: str | None
    help: str
    owner: str  # the class that declares it

    @functools.cached_property
    def type(self) -> tuple[str, tuple, bool]:
        """A key of KINDS, the choices of a Literal, whether it is a tuple: "tuple[Path, ...]" -> ("Path", (), True)."""
        node, choices, many = ast.parse(self.annotation, mode="eval").body, (), False
        match node:
            case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(None)):
                node = inner
        match node:
            case ast.Subscript(ast.Name("tuple"), ast.Tuple([inner, ast.Constant(value)])) if value is ...:
                node, many = inner, True
        match node:
            case ast.Subscript(ast.Name("Literal"), inner):
                choices = ast.literal_eval(inner)
                choices = choices if isinstance(choices, tuple) else (choices,)
                node = ast.Name(type(choices[0]).__name__)
        if not isinstance(node, ast.Name) or node.id not in KINDS or (many and node.id == "bool"):
            raise TypeError(f"{self.owner}.{self.name}: a flag cannot be {self.annotation}; see flux/cli.py")
        return node.id, choices, many

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> tuple[str, str]:
        """What the value should be, in words, and an example."""
        kind, choices, _ = self.type
        return (f"one of {', '.join(map(str, choices))}", str(choices[0])) if choices else KINDS[kind][1:]


@dataclass(frozen=True)
class Command:
    """One dataclass: its `name`, first docstring line, fields, and which of them takes the words without a flag."""

    name: str
    doc: str
    fields: tuple[Field, ...]
    positional: str | None


@dataclass(frozen=True)
class Recipe:
    doc: str
    sample: Command | None
    train: dict[str, Command]


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.py")) if not path.stem.startswith("_")}


def describe(path: Path) -> Recipe:
    """What the file at `path` offers, without running it."""
    tree, _ = _read(path)
    sample, train = None, {}
    for node in tree.body:
        match node:
            case ast.Assign([ast.Name("SAMPLE")], ast.Name(name)):
                sample = _command(path, name)
            case ast.Assign([ast.Name("TRAIN")], ast.Dict(stages, classes)):
                train = {stage.value: _command(path, node.id) for stage, node in zip(stages, classes, strict=True)}
    return Recipe(_first_line(tree), sample, train)


@functools.cache
def _read(path: Path) -> tuple[ast.Module, dict[int, str]]:
    """The syntax tree of a file, and its comments by line number, which ast drops."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    return ast.parse(source, str(path)), comments


def _first_line(node: ast.Module | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def _command(path: Path, name: str) -> Command:
    found = _find(path, name)
    assert found, f"{path}: no class {name}"
    members, positional = _members(*found)
    reserved = {"config", "from", "help"} & set(members)
    assert not reserved, f"{path}: {name} has fields named like flags of every command: {reserved}"
    for field in members.values():
        field.type  # noqa: B018  an impossible annotation shows when the recipe is written, not when the flag is used
    return Command(name, _first_line(found[1]), tuple(members.values()), positional)


def _find(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """The class called `name` in the file at `path`, or where that file imports it from; None outside the project."""
    for node in _read(path)[0].body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    folder = path.parents[node.level - 1] if node.level else ROOT
                    module = folder.joinpath(*(node.module or "").split("."))
                    sources = filter(Path.exists, (module.with_suffix(".py"), module / "__init__.py"))
                    source = next(sources, None)
                    return _find(source, alias.name) if source else None
    return None


def _members(path: Path, node: ast.ClassDef) -> tuple[dict[str, Field], str | None]:
    """Fields by name as dataclasses order them, those of the bases first, and the value of POSITIONAL."""
    comments, members, positional = _read(path)[1], {}, None
    for base in reversed(node.bases):
        found = _find(path, base.id) if isinstance(base, ast.Name) else None
        if found:
            inherited, word = _members(*found)
            members |= inherited
            positional = word or positional
    for line in node.body:
        match line:
            case ast.AnnAssign(ast.Name(name), annotation, value):
                trailing = (comments.get(number) for number in range(line.lineno, line.end_lineno + 1))
                text = " ".join(filter(None, trailing)) or (members[name].help if name in members else "")
                default = ast.unparse(value) if value else None
                members[name] = Field(name, ast.unparse(annotation), default, text, node.name)
            case ast.Assign([ast.Name("POSITIONAL")], ast.Constant(name)):
                positional = name
    return members, positional


def path_and_scale(flag: str, word: str, least: float, most: float) -> tuple[Path, float]:
    """PATH or PATH:SCALE of a flag; without a scale it is 1. A colon before no number is part of the name."""
    path, _, scale = word.rpartition(":")
    try:
        value = float(scale) if path else 1.0
    except ValueError:
        return Path(word), 1.0
    if not least <= value <= most:
        raise UserError(f"{flag} {word}: scale {scale}, expected a number from {least:g} to {most:g}; write {path}:0.5")
    return Path(path or word), value


def wants_help(argv: list[str]) -> bool:
    words = argv[:argv.index("--")] if "--" in argv else argv
    return "--help" in words or "-h" in words


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag value` or `--flag=value`, the last if repeated, and the words that are left."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == "--":
            return value, [*rest, word, *words]
        if word == flag or word.startswith(flag + "="):
            value = word[len(flag) + 1:] if "=" in word else next(words, "--")
            if not value or _is_flag(value):
                raise UserError(f"{flag} came without a value, expected a path, as in {flag} some/file")
        else:
            rest.append(word)
    return value, rest


def parse(argv: list[str], command: Command, remembered: Mapping | None = None) -> dict:
    """The values the user gave, typed and by field name: flags over `--config file.toml` over a picture's metadata.

    `remembered` is that metadata, field values as JSON has them; it is checked like a config file.
    """
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python carries bytes that are not UTF-8
            raise UserError(f"{ascii(word)} is not UTF-8, expected text or a path in UTF-8; rename or retype it")
    config, argv = take(argv, "--config")
    values = _from_table(remembered or {}, command, "the picture's metadata")
    if config:
        values |= _from_table(read_toml(Path(config)), command, config)
    values |= _from_words(argv, command)
    for field in command.fields:
        if field.default is None and field.name not in values:
            what, example = field.expected
            raise UserError(f"{field.flag} is missing, expected {what}; add {field.flag} {example}")
    return values


def read_toml(path: Path) -> dict:
    import tomllib  # here, as few runs need it

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror.lower()}; expected a TOML file that can be read") from None
    except ValueError as error:  # broken TOML or UTF-8
        reason = str(error).replace("\n", " ")
        raise UserError(f"--config {path} is not TOML: {reason}; expected lines such as seed = 42") from None


def _is_flag(word: str) -> bool:
    """`--steps`, `-s` and a lone `--`; not `-1.5`, which is a value, nor `-a cat`: no flag has a space."""
    return word == "--" or re.match(r"--?[^\W\d][^\s=]*(=|\Z)", word) is not None


def _from_words(argv: list[str], command: Command) -> dict:
    by_name, values, words = {field.name: field for field in command.fields}, {}, iter(argv)
    positional = by_name.get(command.positional)

    def add(field: Field, word: str) -> None:
        value = _from_word(word, field)
        values[field.name] = (*values.get(field.name, ()), value) if field.type[2] else value

    def add_positional(word: str) -> None:
        if positional is None or (positional.name in values and not positional.type[2]):
            raise UserError(f"{word!r} came without a flag, expected --flag {word!r}; --help lists the flags")
        add(positional, word)

    for word in words:
        if word == "--":
            break
        if not _is_flag(word):
            add_positional(word)
            continue
        given, equals, value = word.partition("=")
        name = given.lstrip("-").replace("-", "_")
        field = by_name.get(name) or by_name.get(name.removeprefix("no_"))
        if not given.startswith("--") or field is None or (field.name != name and field.type[0] != "bool"):
            flags = [field.flag for field in command.fields] + ["--config"]
            raise UserError(f"unknown flag {given}, nearest is {nearest(given.replace('_', '-'), flags)}; "
                            "--help lists all")
        if field.type[0] == "bool":
            if equals:
                raise UserError(f"{word} came with a value, expected {field.flag} or --no-{field.flag[2:]} alone")
            values[field.name] = field.name == name
            continue
        if not equals:
            value = next(words, "--")
            if _is_flag(value):
                what, example = field.expected
                hint = f"{field.flag} {example}" if value == "--" else f"{field.flag}={value} if {value} is the value"
                raise UserError(f"{given} came without a value, expected {what}; write {hint}")
        add(field, value)
    for word in words:  # past a lone --
        add_positional(word)
    return values


def _from_word(word: str, field: Field):
    kind, (what, example) = field.type[0], field.expected
    try:
        return _checked({"int": int, "float": float}.get(kind, str)(word), field)
    except ValueError:
        raise UserError(f"{field.flag} came as {word!r}, expected {what}, as in {field.flag} {example}") from None


def _from_table(table: Mapping, command: Command, place: str) -> dict:
    by_name, values = {field.name: field for field in command.fields}, {}
    for key, value in table.items():
        field = by_name.get(key.replace("-", "_"))
        if field is None:
            raise UserError(f"unknown key {key!r} in {place}, nearest is {nearest(key, by_name)!r}; --help lists all")
        many, (what, example) = field.type[2], field.expected
        try:
            if many and not isinstance(value, list):
                raise ValueError
            values[field.name] = tuple(_checked(item, field) for item in value) if many else _checked(value, field)
        except ValueError:
            example = example if field.type[0] in ("int", "float", "bool") else json.dumps(example.strip('"'))
            what, example = (f"a list, each {what}", f"[{example}]") if many else (what, example)
            raise UserError(f"{key} in {place} is {value!r}, expected {what}, as in {key} = {example}") from None
    return values


def _checked(value, field: Field):
    """A value of a flag or a table, in the field's type; ValueError where it is of another."""
    kind, choices, _ = field.type
    if kind == "float" and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    wanted = {"int": int, "float": float, "bool": bool}.get(kind, str)
    if type(value) is not wanted or (choices and value not in choices):
        raise ValueError
    if kind == "float" and not math.isfinite(value):
        raise ValueError
    if kind == "Path":
        if not value or "\0" in value:  # Path("") would be the working directory
            raise ValueError
        return Path(value)
    return value


def nearest(word: str, names: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar of `names`, if its similarity reaches `cutoff` in [0, 1]."""
    import difflib  # here, as only mistakes need it

    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)), None)


def help_text(usage: str, command: Command, more: Iterable[tuple[str, str]] = ()) -> str:
    """Usage, the command's one line, and a row per flag: its own first, then `more` rows, then those of its bases."""
    own = [_row(field, command) for field in command.fields if field.owner == command.name]
    shared = [_row(field, command) for field in command.fields if field.owner != command.name]
    common = [("--config FILE", "TOML file that sets the same fields; flags win"), ("-h, --help", "this text"), *more]
    return f"usage: {usage}\n\n{command.doc}\n\n{columns([*own, *common, *shared])}"


def _row(field: Field, command: Command) -> tuple[str, str]:
    kind, choices, many = field.type
    value = "|".join(map(str, choices)) or KINDS[kind][0]
    left = f"{field.flag}, --no-{field.flag[2:]}" if kind == "bool" else f"{field.flag} {value}"
    notes = ["also without the flag"] * (field.name == command.positional) + ["repeatable"] * many
    if "default" not in field.help:  # a comment that speaks of its default knows better
        notes += filter(None, [_default(field)])
    return left, field.help + f" ({', '.join(notes)})" * bool(notes)


def _default(field: Field) -> str:
    """The default in words; nothing for an absent path or text, whose comment says what then happens."""
    match ast.parse(field.default or "...", mode="eval").body:
        case ast.Constant(value) if value is ...:
            return "required"
        case ast.Constant(None):
            return "default: the model's own" if field.type[0] in ("int", "float") else ""
        case ast.Constant(bool(value)):
            return "default on" if value else "default off"
        case ast.Constant("") | ast.Tuple([]):
            return ""
        case ast.Constant(str(value)) | ast.Call(ast.Name("Path"), [ast.Constant(value)]):
            return f"default {value}"
    return f"default {field.default}"


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the right one wrapped to the terminal's width."""
    import shutil  # both here, as they cost a tenth of the start
    import textwrap

    rows, width = list(rows), min(shutil.get_terminal_size((100, 24)).columns, 120)
    indent = min(28, max((len(left) for left, _ in rows), default=0)) + 4
    lines = []
    for left, right in rows:
        first, *others = textwrap.wrap(right, max(24, width - indent)) or [""]
        if len(left) + 4 > indent:  # too long for its column: the text starts one line lower
            lines.append(f"  {left}")
            left = ""
        lines.append(f"  {left:{indent - 2}}{first}".rstrip())
        lines += [" " * indent + other for other in others]
    return "\n".join(lines)


def build(path: Path, command: Command, values: Mapping):
    """The recipe's dataclass with `values`. Runs the recipe's file: torch is imported here and not before."""
    instance = getattr(importlib.import_module(f"flux.recipes.{path.stem}"), command.name)(**values)
    assert {field.name for field in fields(instance)} == {field.name for field in command.fields}, command
    return instance


def training(argv: list[str]) -> tuple[str, str, object]:
    """`recipe [stage] --flags` -> (recipe, stage, instance); help, asked for or for no words, is printed and exits."""
    found = recipes()
    stages = {(name, stage): command for name, path in found.items()
              for stage, command in describe(path).train.items()}
    plain = len(argv) < 2 or _is_flag(argv[1])  # no stage is named: the one called "", if the recipe has it
    chosen, words = ((*argv[:1], ""), argv[1:]) if plain else (tuple(argv[:2]), argv[2:])
    names = {name for name, _ in stages}
    if not argv or wants_help(argv):
        shown = [pair for pair in stages if pair[0] == argv[0]] if argv and argv[0] in names else stages
        print(help_text(f"python train.py {' '.join(filter(None, chosen))} [flags]", stages[chosen]) if chosen in stages else
              "usage: python train.py recipe stage [flags]; with --help it lists the flags of that stage\n\n"
              + columns((" ".join(pair), stages[pair].doc) for pair in shown), flush=True)
        raise SystemExit
    name, stage = chosen
    if name not in names:
        hint = f"nearest is {nearest(name, names)}; " if names else ""
        raise UserError(f"{name!r} is no recipe that trains, {hint}python train.py --help lists all")
    if chosen not in stages:
        own = [other for recipe, other in stages if recipe == name and other]
        if not own:
            raise UserError(f"{stage!r} is no stage of {name}, which has none by name; leave it out, as in "
                            f"python train.py {name}")
        near = nearest(stage, own) if stage else own[0]
        came = f"{stage!r} is no stage of {name}, nearest is {near}" if stage else f"{name} came without a stage"
        raise UserError(f"{came}; expected one of {', '.join(own)}, as in python train.py {name} {near}")
    return name, stage, build(found[name], stages[chosen], parse(words, stages[chosen]))


def as_dict(instance) -> dict:
    """Field values that JSON and TOML know; fields that are None are left out, as a default of None needs no word."""
    def plain(value):
        return str(value) if isinstance(value, Path) else [plain(v) for v in value] if type(value) is tuple else value

    values = {field.name: plain(getattr(instance, field.name)) for field in fields(instance)}
    return {name: value for name, value in values.items() if value is not None}


def to_toml(instance) -> str:
    """A config file from which `--config` reads equal values."""
    # JSON writes strings, numbers, booleans and lists as TOML does, but leaves DEL bare, which TOML forbids.
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in as_dict(instance).items()}
    return "".join(f"{name} = {text}\n" for name, text in texts.items()).replace("\x7f", "\\u007f")


def write_toml(path: Path, instance, comment: str) -> None:
    """The config file of `instance` at `path`, whole or not at all, with `comment` as its first line."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"# {comment}\n{to_toml(instance)}")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the words of the command line and leave the process with its exit code.

    A user's mistake exits 2, a full disk 1, Ctrl-C 130, each with one line; a bug shows its traceback.
    """
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's own end
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        try:
            os.write(sys.stdout.fileno(), b"\n")  # an output that takes this is not what broke
        except BrokenPipeError:  # the reader, such as `head`, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        else:
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}; free some and run the command again", file=sys.stderr)
        code = 1
    sys.exit(code)
