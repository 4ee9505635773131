"""Recipes as commands: read without running, flags and config files checked, mistakes told in one line."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import flux.recipes
import sample
from flux import cli, pictures
from flux.errors import UserError
from flux.settings import Sampling, Training

ROOT = Path(__file__).parents[1]

PICTURE = '''"""Pictures from words.

Second paragraph.
"""

import torch
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from flux.settings import Sampling, Training


@dataclass(frozen=True)
class Draw(Sampling):
    """Draws what the prompt says."""

    prompt: tuple[str, ...] = ()  # what to draw; several make several pictures
    prompts: Path | None = None  # file with one prompt a line; # comments
    strength: float = 0.5  # of the effect, 0 to 1
    tile: int | None = None  # pixels per tile
    paths: tuple[Path, ...] = ()  # files to mix in
    shift: bool = False  # move the schedule
    order: Literal[1, 2] = 1  # of the integrator
    num: int = 2  # pictures per prompt
    seed: int = 3
    POSITIONAL = "prompt"

    def images(self):
        torch.manual_seed(self.seed)
        for i in range(self.num):
            pil = Image.new("RGB", (8, 8), (self.seed + i, 0, 0))
            yield pil, {"seed": self.seed + i, "config": replace(self, seed=self.seed + i, num=1)}


@dataclass(frozen=True)
class Learn(Training):
    """Learns to draw."""

    lr: float = 3e-4  # of the head


SAMPLE = Draw
TRAIN = {"flow": Learn}
'''
REPAIR = '''"""Repairs a picture."""

from dataclasses import dataclass
from pathlib import Path

from flux.settings import Sampling as Shared

import torch


@dataclass(frozen=True, kw_only=True)
class Repair(Shared):
    """Makes an old picture new."""

    image: Path  # the old picture
    POSITIONAL = "image"


SAMPLE = Repair
'''
STAGES = '''"""Rebuilds the demo."""

from .t2i import Learn

TRAIN = {"clip": Learn, "vae": Learn}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of recipes in place of flux/recipes."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, source in {"t2i": PICTURE, "repair": REPAIR, "demo": STAGES, "_draft": "1 +"}.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(cli, "RECIPES", folder)
    monkeypatch.setattr(flux.recipes, "__path__", [str(folder)])
    for name in ("t2i", "repair", "demo"):  # after the test, no other meets these under the true recipes' names
        monkeypatch.setitem(sys.modules, f"flux.recipes.{name}", None)
        del sys.modules[f"flux.recipes.{name}"]
        monkeypatch.delattr(flux.recipes, name, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def draw(folder):
    return cli.describe(folder / "t2i.py").sample


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message[0] == message[0].lower()
    return message


def test_recipes_are_the_files_of_a_folder(folder):
    assert cli.recipes() == {name: folder / f"{name}.py" for name in ("demo", "repair", "t2i")}


def test_a_recipe_is_read_without_running(folder):
    (folder / "t2i.py").write_text(PICTURE + "\nraise SystemExit\n")
    recipe = cli.describe(folder / "t2i.py")
    assert recipe.doc == "Pictures from words."
    assert (recipe.sample.name, recipe.sample.doc) == ("Draw", "Draws what the prompt says.")
    assert recipe.sample.positional == "prompt"
    assert list(recipe.train) == ["flow"] and recipe.train["flow"].doc == "Learns to draw."
    by_name = {field.name: field for field in recipe.sample.fields}
    prompts = by_name["prompts"]
    assert (prompts.annotation, prompts.default) == ("Path | None", "None")
    assert prompts.help == "file with one prompt a line; # comments"
    assert by_name["num"].default == "2" and by_name["num"].owner == "Draw"
    assert by_name["seed"].default == "3" and "seed + i" in by_name["seed"].help  # its line has no comment: inherited
    assert by_name["out"].owner == "Sampling" and by_name["out"].default == "Path('out')"


@pytest.mark.parametrize("shared", [Sampling, Training])
def test_shared_flags_are_read_as_python_sees_them_and_say_what_they_are(shared):
    command = cli._command(ROOT / "flux" / "settings.py", shared.__name__)
    assert [field.name for field in command.fields] == list(shared.__dataclass_fields__)
    assert [field.name for field in command.fields if len(field.help) < 10] == []
    assert cli.parse([], command) == {}


def test_bases_are_found_through_aliases_and_imports_of_imports(folder):
    repair, demo = cli.describe(folder / "repair.py"), cli.describe(folder / "demo.py")
    assert {"image", "width", "metadata"} <= {field.name for field in repair.sample.fields}
    assert demo.sample is None and list(demo.train) == ["clip", "vae"]
    assert {field.name: field.default for field in demo.train["vae"].fields}["lr"] == "0.0003"


def test_an_impossible_annotation_names_its_field(folder):
    (folder / "odd.py").write_text("class Odd:\n    sizes: dict[str, int] = {}  # of things\nSAMPLE = Odd\n")
    with pytest.raises(TypeError, match="Odd.sizes"):
        cli.describe(folder / "odd.py")


@pytest.mark.parametrize("words, values", [
    ("", {}),
    ("--steps 4", {"steps": 4}),
    ("--steps=4 --steps 5", {"steps": 5}),
    ("--strength -1", {"strength": -1.0}),
    ("--strength -.5e-3", {"strength": -0.0005}),
    ("--tile -16", {"tile": -16}),
    ("--no-metadata --shift", {"metadata": False, "shift": True}),
    ("--shift --no_shift", {"shift": False}),
    ("--out some/where --t5=t5", {"out": Path("some/where"), "t5": Path("t5")}),
    ("--dtype bf16 --order 2", {"dtype": "bf16", "order": 2}),
    ("--paths a --paths b", {"paths": (Path("a"), Path("b"))}),
    ("cat --seed 1 dog", {"prompt": ("cat", "dog"), "seed": 1}),
    ("cat --prompt dog -5 -", {"prompt": ("cat", "dog", "-5", "-")}),
    ("--seed 1 -- --steps -- cat", {"prompt": ("--steps", "--", "cat"), "seed": 1}),
    ("--prompt=--steps=4", {"prompt": ("--steps=4",)}),
])
def test_flags(draw, words, values):
    parsed = cli.parse(words.split(), draw)
    assert parsed == values
    assert {key: type(value) for key, value in parsed.items()} == {key: type(value) for key, value in values.items()}


def test_help_is_a_word_like_others_after_two_dashes():
    assert cli.wants_help(["cat", "--help"]) and cli.wants_help(["-h"])
    assert not cli.wants_help(["cat", "--", "--help"])


def test_a_prompt_may_start_with_a_dash_and_hold_anything(draw):
    words = ["- a cat", "-a cat, =", "", "two\nlines", "--prompt", "-- 🐱 'x' \"y\""]
    assert cli.parse(words, draw)["prompt"] == ("- a cat", "-a cat, =", "", "two\nlines", "-- 🐱 'x' \"y\"")


@pytest.mark.parametrize("name", ["save_every", "save-every"])
def test_underscore_and_dash_are_the_same(folder, name):
    learn = cli.describe(folder / "t2i.py").train["flow"]
    assert cli.parse([f"--{name}", "7"], learn) == cli.parse([f"--{name}=7"], learn) == {"save_every": 7}
    (folder / "c.toml").write_text(f"{name} = 7")
    assert cli.parse(["--config", str(folder / "c.toml")], learn) == {"save_every": 7}


@pytest.mark.parametrize("words, parts", [
    (["--stpes", "4"], ["--stpes", "nearest is --steps"]),
    (["--sede=4"], ["--sede", "nearest is --seed"]),
    (["--no-steps", "4"], ["unknown flag --no-steps"]),
    (["-s", "4"], ["unknown flag -s"]),
    (["-steps", "4"], ["unknown flag -steps", "--steps"]),
    (["--steps:4"], ["unknown flag --steps:4", "nearest is --steps"]),
    (["--steps", "many"], ["--steps", "'many'", "a whole number", "--steps 20"]),
    (["--steps", "4.5"], ["--steps", "'4.5'", "a whole number"]),
    (["--steps", "9" * 5000], ["--steps", "a whole number"]),
    (["--guidance", "nan"], ["--guidance", "'nan'", "a number"]),
    (["--guidance", "1e999"], ["--guidance", "'1e999'", "a number"]),
    (["--dtype", "int8"], ["--dtype", "'int8'", "auto, fp32, bf16, fp16"]),
    (["--order", "3"], ["--order", "'3'", "one of 1, 2"]),
    (["--out="], ["--out", "''", "a path"]),
    (["--steps"], ["--steps", "without a value", "a whole number"]),
    (["--steps", "--seed", "4"], ["--steps", "without a value"]),
    (["--config"], ["--config", "without a value"]),
    (["--shift=true"], ["--shift=true", "--no-shift"]),
    (["caf\udce9"], ["UTF-8"]),
])
def test_mistakes_in_flags_are_told_in_one_line(draw, words, parts):
    message = refusal(cli.parse, words, draw)
    assert [part for part in parts if part not in message] == []


def test_a_required_field_and_a_second_word_for_one(folder):
    repair = cli.describe(folder / "repair.py").sample
    assert cli.parse(["old.png"], repair) == {"image": Path("old.png")}
    assert "--image is missing" in refusal(cli.parse, [], repair)
    assert "'b.png'" in refusal(cli.parse, ["a.png", "b.png"], repair)
    learn = cli.describe(folder / "t2i.py").train["flow"]
    assert "'more'" in refusal(cli.parse, ["more"], learn)


def test_flags_win_over_the_config_and_the_config_over_the_picture(draw, tmp_path):
    (tmp_path / "c.toml").write_text('seed = 1\nsteps = 2\nprompt = ["a", "b"]\nguidance = 2\nout = "here"\n')
    words = ["--config", str(tmp_path / "c.toml"), "--seed", "9", "c"]
    values = cli.parse(words, draw, {"steps": 5, "width": 64, "metadata": False})
    assert values == {"seed": 9, "steps": 2, "prompt": ("c",), "guidance": 2.0, "out": Path("here"), "width": 64,
                      "metadata": False}
    assert type(values["guidance"]) is float


@pytest.mark.parametrize("text, parts", [
    ("stpes = 4", ["'stpes'", "c.toml", "nearest is 'steps'"]),
    ("steps = ", ["c.toml", "is not TOML", "seed = 42"]),
    ("steps = '4'", ["steps in", "'4'", "a whole number"]),
    ("steps = true", ["steps in", "True", "a whole number"]),
    ("guidance = nan", ["guidance in", "a number"]),
    ("guidance = 1" + "0" * 400, ["guidance in", "a number"]),
    ("metadata = 0", ["metadata in", "true or false"]),
    ("dtype = 'fp8'", ["dtype in", "auto, fp32, bf16, fp16"]),
    ("order = '1'", ["order in", "one of 1, 2"]),
    ("prompt = 'a cat'", ["prompt in", "a list", 'prompt = ["']),
    ("paths = ['a', 1]", ["paths in", "a list"]),
    ("out = \"a\\u0000b\"", ["out in", "a path"]),
    ("[steps]\nn = 1", ["steps in", "a whole number"]),
])
def test_mistakes_in_a_config_are_told_in_one_line(draw, tmp_path, text, parts):
    (tmp_path / "c.toml").write_text(text)
    message = refusal(cli.parse, ["--config", str(tmp_path / "c.toml")], draw)
    assert [part for part in parts if part not in message] == []


def test_a_config_that_cannot_be_read(draw, tmp_path):
    assert "no such file" in refusal(cli.parse, ["--config", str(tmp_path / "none.toml")], draw)
    assert "directory" in refusal(cli.parse, ["--config", str(tmp_path)], draw)
    (tmp_path / "latin.toml").write_bytes(b'prompt = ["caf\xe9"]')
    assert "TOML" in refusal(cli.parse, ["--config", str(tmp_path / "latin.toml")], draw)


def test_help_fits_the_width_and_shows_defaults(draw, monkeypatch):
    for width in (60, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        text = cli.help_text("python sample.py t2i [arguments]", draw)
        assert max(map(len, text.splitlines())) <= width
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    assert set(rows) >= {field.flag for field in draw.fields} - {"--metadata", "--shift", "--strips"}
    flat = " ".join(text.split())
    assert "--strength X of the effect, 0 to 1 (default 0.5)" in flat
    assert "--tile N pixels per tile (default: the model's own)" in flat
    assert "--prompts PATH file with one prompt a line; # comments --" in flat  # a path that is absent has no default
    assert "--shift, --no-shift move the schedule (default off)" in flat
    assert "--order 1|2 of the integrator (default 1)" in flat
    assert "(default out)" in flat and "(default on)" in flat
    assert "--prompt TEXT what to draw; several make several pictures (also without the flag, repeatable)" in flat
    assert text.index("--strength") < text.index("--width")  # its own flags come first


def test_help_says_what_is_required(folder):
    assert "the old picture (also without the flag, required)" in cli.help_text(
        "", cli.describe(folder / "repair.py").sample)


@dataclass(frozen=True)
class Everything:
    text: str = ""
    number: float = 1e-5
    large: float = 1e22
    count: int = -3
    yes: bool = True
    path: Path = Path("a b/ü.png")
    nothing: int | None = None
    texts: tuple[str, ...] = ()
    paths: tuple[Path, ...] = (Path("x"), Path("C:\\y"))
    sizes: tuple[int, ...] = (1, 2)


NASTY = "".join(map(chr, range(1, 0x200))) + "\u2028\ufeff🐱'''\"\"\"\\u0041 # = [x]\r\n"


@pytest.mark.parametrize("instance", [
    Everything(), Everything(text=NASTY, texts=("", NASTY, "a"), path=Path(NASTY), yes=False, nothing=0),
])
def test_a_written_config_reads_back_equal(instance, tmp_path):
    command = cli._command(Path(__file__), "Everything")
    cli.write_toml(tmp_path / "c.toml", instance, "python sample.py t2i")
    assert os.listdir(tmp_path) == ["c.toml"]
    values = cli.parse(["--config", str(tmp_path / "c.toml")], command)
    assert Everything(**values) == instance
    assert ("nothing" in values) == (instance.nothing is not None)
    assert {key: type(value) for key, value in values.items()} == {key: type(vars(instance)[key]) for key in values}
    again = cli.parse([], command, json.loads(json.dumps(cli.as_dict(instance))))
    assert Everything(**again) == instance


def test_build_runs_the_recipe(folder, draw):
    built = cli.build(folder / "t2i.py", draw, {"steps": 4, "prompt": ("a",)})
    assert (built.steps, built.prompt, built.num, built.out) == (4, ("a",), 2, Path("out"))
    assert "--width 100" in refusal(cli.build, folder / "t2i.py", draw, {"width": 100})


def run(main, capfd) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capfd.readouterr().err


def fail(error):
    def main(argv):
        raise error
    return main


def test_exit_codes(capfd):
    assert run(lambda argv: None, capfd) == (0, "")
    assert run(lambda argv: 1, capfd) == (1, "")
    assert run(fail(UserError("this came, that was expected")), capfd) == (2, "error: this came, that was expected\n")
    assert run(fail(KeyboardInterrupt()), capfd) == (130, "\nstopped\n")
    code, said = run(fail(OSError(errno.ENOSPC, "No space left on device", "out/a.png")), capfd)
    assert code == 1 and said.count("\n") == 1 and "out/a.png" in said
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("a bug"), BrokenPipeError("of a socket")):
        with pytest.raises(type(error)):
            cli.run(fail(error))


@pytest.mark.parametrize("lines", [1, 100_000])  # held back in the buffer until the end, or failing midway
def test_a_reader_that_leaves_is_no_error(lines):
    code = f"from flux import cli; cli.run(lambda argv: [print('line') for _ in range({lines})] and None)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_train_dispatch(folder):
    name, stage, instance = cli.training(["t2i", "flow", "--steps", "5"])
    assert (name, stage, type(instance).__name__, instance.steps, instance.lr) == ("t2i", "flow", "Learn", 5, 3e-4)
    assert cli.training(["demo", "clip"])[:2] == ("demo", "clip")
    assert "nearest is t2i" in refusal(cli.training, ["t2j", "flow"])
    assert "nearest is flow" in refusal(cli.training, ["t2i", "flo"])
    for argv in (["demo"], ["demo", "--steps", "4"]):
        assert "without a stage; expected one of clip, vae" in refusal(cli.training, argv)
    assert "no recipe that trains" in refusal(cli.training, ["repair", "flow"])


@pytest.mark.parametrize("argv, shown, hidden", [
    ([], ["t2i flow", "demo vae Learns to draw."], "repair"),
    (["--help"], ["t2i flow", "demo vae"], "repair"),
    (["demo", "--help"], ["demo clip", "demo vae"], "t2i"),
    (["t2i", "flow", "--help"], ["train.py t2i flow", "of the head (default 0.0003)"], "vae"),
])
def test_train_help(folder, capsys, argv, shown, hidden):
    with pytest.raises(SystemExit) as caught:
        cli.training(argv)
    text = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code
    assert [part for part in shown if part not in text] == [] and hidden not in text


def names(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


def test_sample_writes_pictures_config_and_sheet(folder, capsys):
    sample.main(["a cat", "--steps", "4"])  # no recipe named: t2i
    assert names("out") == ["00001_seed3.png", "00001_seed3.toml", "00001_seed3_sheet.png", "00002_seed4.png"]
    second = pictures.read_metadata("out/00002_seed4.png")
    assert second["recipe"] == "t2i"
    assert (second["config"]["seed"], second["config"]["num"], second["config"]["prompt"]) == (4, 1, ["a cat"])
    assert "out" not in second["config"]
    config = tomllib.loads(Path("out/00001_seed3.toml").read_text())
    assert (config["seed"], config["num"], config["steps"]) == (3, 2, 4)
    assert 'prompt = ["a cat"]' in capsys.readouterr().out  # the merged configuration is printed
    before = Path("out/00001_seed3.png").read_bytes()
    sample.main(["--config", "out/00001_seed3.toml", "--seed", "9"])
    assert "00003_seed9.png" in names("out") and Path("out/00001_seed3.png").read_bytes() == before


def test_sample_leaves_metadata_out_when_asked(folder):
    sample.main(["t2i", "--no-metadata", "--num", "1"])
    assert names("out") == ["00001_seed3.png", "00001_seed3.toml"]
    assert Image.open("out/00001_seed3.png").info == {}


def test_a_picture_is_made_again_from_its_metadata(folder):
    sample.main(["t2i", "a cat", "--out", "mine"])
    sample.main(["--from", "mine/00002_seed4.png"])
    assert names("out") == ["00001_seed4.png", "00001_seed4.toml"]
    assert Path("out/00001_seed4.png").read_bytes() == Path("mine/00002_seed4.png").read_bytes()
    sample.main(["t2i", "--from=mine/00002_seed4.png", "--seed", "8"])
    assert "00002_seed8.png" in names("out")


@pytest.mark.parametrize("metadata, part", [
    ({}, "does not say"),
    ({"recipe": "t2i"}, "does not say"),
    ({"recipe": "../../evil", "config": {}}, "expected a recipe"),
    ({"recipe": "t2i", "config": {"stpes": 4}}, "nearest is 'steps'"),
    ({"recipe": "t2i", "config": {"steps": "4"}}, "the picture's metadata"),
    ({"recipe": "repair", "config": {"image": "a"}}, "leave out"),
])
def test_strange_metadata_is_refused(folder, metadata, part):
    pictures.write_png("a.png", Image.new("RGB", (8, 8)), metadata)
    assert part in refusal(sample.main, ["t2i", "--from", "a.png"])
    assert not Path("out").exists()


def test_a_picture_does_not_say_where_to_write(folder):
    pictures.write_png("a.png", Image.new("RGB", (8, 8)), {"recipe": "t2i", "config": {"out": "elsewhere", "seed": 5}})
    sample.main(["--from", "a.png", "--num", "1"])
    assert names("out") == ["00001_seed5.png", "00001_seed5.toml"] and not Path("elsewhere").exists()


def test_sample_mistakes(folder):
    assert "makes no pictures" in refusal(sample.main, ["demo"])
    assert "is the recipe repair meant?" in refusal(sample.main, ["repare", "--image", "a.png"])
    assert "meant" not in refusal(sample.main, ["a cat", "--image", "a.png"])
    (folder / "t2i.py").unlink()
    assert "recipe 't2i' is not here" in refusal(sample.main, [])


WITHOUT_TORCH = """
import sys
from pathlib import Path
from flux import cli
cli.RECIPES = Path(sys.argv.pop(1))
import sample
try:
    cli.run(sample.main if sys.argv.pop(1) == "sample" else cli.training)
finally:
    print("heavy:", sorted({"torch", "numpy", "PIL"} & set(sys.modules)))
"""


@pytest.mark.parametrize("words, code, part", [
    (["sample", "--help"], 0, "Repairs a picture."),
    (["sample", "t2i", "-h"], 0, "--strength"),
    (["sample", "--stpes", "4"], 2, "--steps"),
    (["sample", "repair", "--steps", "many"], 2, "'many'"),
    (["train", "t2i", "flow", "--help"], 0, "--save-every"),
    (["train", "t2i", "flow", "--batch", "many"], 2, "'many'"),
])
def test_help_and_mistakes_import_nothing_heavy(folder, words, code, part):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder), *words], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "heavy: []")
    assert part in (done.stderr if code else done.stdout)


def test_help_of_the_true_command(tmp_path):
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "sample.py", "--help"], cwd=tmp_path,
                          capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "python sample.py [recipe]" in done.stdout
    assert "flux.cli" in imported and not imported & {"torch", "numpy", "PIL"}
    assert os.listdir(tmp_path) == []


def test_bench_has_its_own_command(monkeypatch):
    bench = type(sys)("flux.bench")
    bench.main = lambda argv: argv
    monkeypatch.setattr(flux, "bench", bench, raising=False)
    monkeypatch.setitem(sys.modules, "flux.bench", bench)
    assert sample.main(["bench", "--help"]) == ["--help"]


def test_a_recipe_may_have_a_stage_without_a_name():
    """`python train.py t2i` and `python train.py demo` are commands; a word that is no stage says which there are."""
    with pytest.raises(UserError, match="'x' is no stage of t2i, which has none by name; leave it out"):
        cli.training(["t2i", "x"])
    with pytest.raises(UserError, match="'flwo' is no stage of demo, nearest is flow; expected one of autoencoder, pair"):
        cli.training(["demo", "flwo"])
    name, stage, instance = cli.training(["demo", "--seed", "3"])
    assert (name, stage, instance.seed) == ("demo", "", 3)
    assert [stage for stage, _ in instance.stages()] == [
        "autoencoder", "pair", "flow", "guidance", "fill", "reader", "evaluate"]
