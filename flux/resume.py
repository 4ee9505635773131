"""Checkpoints of a training: a folder per save, whole or not there at all.

A save is written under a temporary name, synced, given its manifest of sizes last and renamed; then `latest` is replaced,
and only then are old ones deleted. All randomness comes from the step (flux/draws.py), so parameters, optimiser and
moving average are the whole state.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from flux import checkpoint
from flux.errors import UserError

ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # a parameter's state
REMEDY = "name another with --resume, or start anew with --resume none"


def save(run: Path, step: int, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer, average: dict[str, Tensor],
         keep: int = 2) -> Path:
    """Write `run/checkpoints/step-000500`, then delete all but the newest `keep`. A full disk is an OSError, no change."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    draft, aside, latest = (folder.with_name(name) for name in (f".{folder.name}", f"{folder.name}-old", "latest"))
    moments = {f"{key}.{name}": value for name, p in parameters.items() for key, value in optimiser.state[p].items()}
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for name, tensors in (("model", parameters), ("ema", average), ("optimiser", moments)):
            checkpoint.save(draft / f"{name}.safetensors", tensors)
        sizes = {file.name: file.stat().st_size for file in sorted(draft.iterdir())}
        _write(draft / "manifest.json", json.dumps({"step": step, "sizes": sizes}))
        if folder.exists():  # the run was started anew, or stopped where it began; `load` finds the old one meanwhile
            shutil.rmtree(aside, ignore_errors=True)
            latest.unlink(missing_ok=True)
            os.replace(folder, aside)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _write(latest, folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    kept = [manifest.parent for manifest in _by_age(run)[-keep:]]
    for old in folder.parent.glob("step-*"):
        if old not in kept:
            shutil.rmtree(old)
    return folder


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    try:
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _by_age(run: Path) -> list[Path]:
    """Manifests, oldest first: a run that was started anew counts its steps from 0, so steps do not tell."""
    return sorted((run / "checkpoints").glob("step-*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)


def load(run: Path, how: str, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer,
         average: dict[str, Tensor]) -> int:
    """Fill everything from a checkpoint and return its step; 0 for a fresh start. What a killed save left is removed.

    `how`: auto (the newest of this run, if any), none, or the folder of a checkpoint, which must then be there.
    """
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover)
    if how == "none":
        return 0
    if how == "auto":
        latest, manifests = run / "checkpoints" / "latest", _by_age(run)
        if not latest.exists() and not manifests:
            return 0
        folder = run / "checkpoints" / latest.read_text() if latest.exists() else manifests[-1].parent
    else:
        folder = Path(how)
    step = _whole(folder)
    model, ema, moments = (checkpoint.read(folder / f"{name}.safetensors") for name in ("model", "ema", "optimiser"))
    expected = {name: p.shape for name, p in parameters.items()}
    for found in (model, ema):
        if {name: value.shape for name, value in found.items()} != expected:
            raise UserError(f"{folder} trained {len(found)} tensors, this run trains {len(expected)}, and their names or "
                            f"shapes differ; expected the same model; {REMEDY}")
    keys = {id(p): MUON if "ns_steps" in group else ADAMW for group in optimiser.param_groups for p in group["params"]}
    states = {name: _moments(folder, name, p, keys[id(p)], moments) for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(model[name])
            average[name].copy_(ema[name])
            if states[name]:
                optimiser.state[p] = states[name]
    return step


def _moments(folder: Path, name: str, p: Tensor, keys: tuple[str, ...], saved: checkpoint.Mapped) -> dict[str, Tensor]:
    """The optimiser's state of one parameter, laid out in memory like it: fused AdamW walks over both side by side.

    Empty for a parameter that never had a gradient.
    """
    found = tuple(key for key in sorted({*ADAMW, *MUON}) if f"{key}.{name}" in saved)
    if found not in ((), tuple(sorted(keys))):
        raise UserError(f"{folder} has of {name} the moments {', '.join(found)}; expected {', '.join(keys)}, as this run's "
                        f"optimiser keeps them; choose the same --optimiser, or {REMEDY}")
    return {key: (torch.empty((), device=p.device) if key == "step" else torch.empty_like(p)).copy_(saved[f"{key}.{name}"])
            for key in found}


def _whole(folder: Path) -> int:
    """The step of a checkpoint, all of whose files have the sizes that its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        step, sizes = int(manifest["step"]), dict(manifest["sizes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no whole checkpoint (its manifest.json is not there or damaged); expected a folder "
                        f"like checkpoints/step-000500; {REMEDY}") from error
    for name in ("model.safetensors", "ema.safetensors", "optimiser.safetensors"):
        path = folder / name
        if not path.is_file() or path.stat().st_size != sizes.get(name):
            raise UserError(f"{path} is not the {sizes.get(name)} bytes that its manifest says; expected a whole "
                            f"checkpoint; {REMEDY}")
    return step


def cut_metrics(path: Path, step: int) -> None:
    """metrics.jsonl cut back to the rows before `step`, since a killed run may have logged past its last checkpoint."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows[:step] if row.startswith("{") and row.endswith("}")]
    _write(path, "".join(row + "\n" for row in kept))
