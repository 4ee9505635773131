"""`python -m vlm_client check URL`: what a server can do, before a run depends on it."""

import argparse
import json
import sys
import tempfile
import time

from PIL import Image, ImageDraw

from vlm_client import VlmError, boxes, critique
from vlm_client.client import FORMATS, KEY, Critic


def check(flags: argparse.Namespace) -> None:
    """Models, pictures, response_format, boxes, seconds: by one question such as a run asks."""
    with tempfile.TemporaryDirectory() as folder:
        critic = Critic(flags.url, folder, flags.model, flags.convention, flags.timeout_s)
        print(f"server      {critic.url}, key from {KEY}: {'yes' if critic.keyed else 'none'}")
        started = time.monotonic()
        offered = critic.models()
        names = critique.readable(", ".join(offered)) or "none named"
        print(f"models      {names} ({time.monotonic() - started:.2f} s)")
        if flags.model and flags.model not in offered:
            raise VlmError(f"--model {flags.model} came, expected one of {names}; take one of these")
        started = time.monotonic()
        plan, = critic.plans([(test_picture(), "a red circle on a grey background")])
        seconds, rows = time.monotonic() - started, list(critic.ledger.answers.values())
        asked = flags.convention or boxes.convention(critic.model)
        print(f"boxes       {asked}, {'as asked' if flags.convention else 'by the name of the model'}")
        print(f"pictures    taken: {len(rows)} answers in {seconds:.2f} s")
        kept = all(whole_object(row["reply"]) for row in rows)
        used = FORMATS[critic.format]
        print(f"format      {'json_schema is refused' if critic.format else 'json_schema is taken'}, answers come with "
              f"{used or 'none'} and are {'JSON alone' if kept else 'not JSON alone'}")
        print(f"plan        {len(plan.edits)} edits"
              + "".join(f"\n            {edit.box} {edit.aspect}: {edit.prompt}" for edit in plan.edits)
              + "".join(f"\n            refused: {words}" for words in plan.refused))
        if plan.analysis:
            print(f"says        {plan.analysis[:400]}")
        if len(rows) > 2 and not plan.edits:
            raise VlmError(f"{critic.name} gave no usable plan in {len(rows)} answers, expected one; take another model")


def whole_object(reply: str) -> bool:
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == critique.schema()["properties"].keys()


def test_picture() -> Image.Image:
    """Dim and grey, with a red disc on the left: something to complain of, and somewhere."""
    pil = Image.new("RGB", (448, 448), (60, 60, 60))
    ImageDraw.Draw(pil).circle((120, 224), 70, (120, 20, 20))
    return pil


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_client", description="Critics of pictures over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help=check.__doc__)
    command.add_argument("url", help="such as http://localhost:8000")
    command.add_argument("--model", help="name of the model, where the server has several")
    command.add_argument("--convention", choices=boxes.CONVENTIONS, help="scale of its boxes, if its name does not tell")
    command.add_argument("--timeout-s", type=float, default=120.0, help="seconds for each question (default: 120)")
    flags = parser.parse_args(argv)
    try:
        check(flags)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
