"""Does each promise's test notice? `python tests/broken_variants.py [P5 ...]` breaks the code in one place at a time, in a
copy of the repository, and runs that promise's test, which must fail. Minutes; not part of pytest.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANTS = (  # promise, what is broken, file, text that stands there once, its replacement, tests
    ("P5", "a save writes into its place", "flux/resume.py", 'draft = folder.with_name(f".{folder.name}")',
     "draft = folder", "test_resume.py::test_killed_at_random_times test_resume.py::test_a_save_that_fails_anywhere"),
    ("P5", "old checkpoints go before the new one is there", "flux/resume.py",
     "    try:\n        if split:", "    shutil.rmtree(folder.parent / (folder.parent / 'latest').read_text(), True) if ("
     "folder.parent / 'latest').exists() else None\n    try:\n        if split:",
     "test_resume.py::test_killed_at_random_times test_resume.py::test_a_save_that_fails_anywhere"),
    ("P6", "the average starts anew", "flux/resume.py", "    fill_ema(average)\n", "", "test_resume.py::test_twelve_cuts"),
    ("P6", "the optimiser starts anew", "flux/resume.py", "    optimiser.state |= ", "    dict() | ",
     "test_resume.py::test_twelve_cuts"),
    ("P6", "micro-steps share their noise", "tests/test_resume.py", 'draws.generator(step, micro, "noise")',
     "torch.default_generator", "test_resume.py::test_twelve_cuts"),
    ("P7", "signals end the run where it is", "train.py", "lambda number, frame: kept.append(number)",
     "signal.default_int_handler", "test_resume.py::test_signals_wait_for_a_state_worth_saving"),
    ("P7", "a full disk leaves half a checkpoint", "flux/resume.py",
     "    finally:\n        if team.leads:\n            shutil.rmtree(draft, ignore_errors=True)\n    return folder",
     "    finally:\n        pass\n    return folder", "test_resume.py::test_a_disk_that_fills_up"),
    ("P8", "the crop is not part of an entry's name", "flux/finetune.py", "item.size, content(item.path)",
     "content(item.path)", "test_cache.py"),
    ("P8", "a damaged entry is believed", "flux/cache.py", 'metadata.get("sha256") == digest(kept)', "metadata",
     "test_cache.py::test_a_damaged_entry_is_made_again"),
    ("P9", "the loss is not looked at", "flux/guards.py", "if finite.all():\n            return\n        weight",
     "return\n        weight", "test_guards.py"),
    ("P9", "the gradients are not looked at", "flux/guards.py", "if not math.isfinite(norm):", "if False:",
     "test_guards.py"),
    ("P11", "links are not followed", "flux/data.py", "Path(os.path.realpath(root / name)).is_relative_to(",
     "Path(os.path.abspath(root / name)).is_relative_to(", "test_data.py::test_names_from_outside_stay_inside"),
    ("P11", "two dots are allowed", "flux/data.py", 'not parts.anchor and ".." not in parts.parts and Path(os.path.realpath('
     "root / name)).is_relative_to(\n            os.path.realpath(root))", "True",
     "test_data.py::test_two_hundred_hostile_names"),
    ("P14", "gradients stay at home", "flux/parallel.py", "and not last else nullcontext()", "else nullcontext()",
     "test_parallel.py"),
    ("P14", "the mean is taken for the sum", "train.py", "(loss * team.size).backward()", "loss.backward()",
     "test_parallel.py"),
    ("P14", "the average stays after a look at it", "flux/parallel.py", "reshard_after_forward=True",
     "reshard_after_forward=module is not act", "test_parallel.py"),
)


def notices(file: str, old: str, new: str, tests: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "out", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
        (copy / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *(f"tests/{test}" for test in tests.split())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900)
        assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
        return done.returncode == 1


def main() -> int:
    chosen = [variant for variant in VARIANTS if not sys.argv[1:] or variant[0] in sys.argv[1:]]
    missed = 0
    for promise, what, *variant in chosen:
        seen = notices(*variant)
        missed += not seen
        print(f"| {promise} | {what} | {'noticed' if seen else 'NOT NOTICED'} |", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
