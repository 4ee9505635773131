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
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux.errors import UserError


def save(run: Path, step: int, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer, average: dict[str, Tensor],
         keep: int = 2) -> Path:
    """Write `run/checkpoints/step-000500`, then delete all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, draft / "model.safetensors")
        save_file({name: p.contiguous() for name, p in average.items()}, draft / "ema.safetensors")
        moments = {f"{key}.{name}": value.contiguous() for name, p in parameters.items()
                   for key, value in optimiser.state[p].items()}
        save_file(moments, draft / "optimiser.safetensors")
        sizes = {}
        for file in sorted(draft.iterdir()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            sizes[file.name] = file.stat().st_size
        (draft / "manifest.json").write_text(json.dumps({"step": step, "sizes": sizes}))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    pointer = run / "checkpoints" / ".latest"
    pointer.write_text(folder.name)
    os.replace(pointer, run / "checkpoints" / "latest")
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return folder


def load(run: Path, how: str, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer,
         average: dict[str, Tensor]) -> int:
    """Fill everything from a checkpoint and return its step; 0 for a fresh start.

    `how`: auto (the newest of this run, if any), none, or the folder of a checkpoint, which must then be there.
    """
    if how == "none":
        return 0
    if how == "auto":
        pointer = run / "checkpoints" / "latest"
        if not pointer.exists():
            return 0
        folder = run / "checkpoints" / pointer.read_text()
    else:
        folder = Path(how)
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds no whole checkpoint (no manifest.json); expected a folder like "
                        f"checkpoints/step-000500; name another with --resume, or start anew with --resume none")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, size in manifest["sizes"].items():
        if not (folder / name).exists() or (folder / name).stat().st_size != size:
            raise UserError(f"{folder / name} is not the {size} bytes that its manifest says; expected a whole checkpoint; "
                            f"name an earlier one with --resume")
    weights = load_file(folder / "model.safetensors")
    if weights.keys() != parameters.keys():
        raise UserError(f"{folder} trained {len(weights)} tensors, this run trains {len(parameters)}; expected the same "
                        f"model; start anew with --resume none or another --out")
    moments = load_file(folder / "optimiser.safetensors")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
            optimiser.state[p] = {key: moments[f"{key}.{name}"].to(p.device) if key != "step" else moments[f"step.{name}"]
                                  for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, value in load_file(folder / "ema.safetensors").items():
            average[name].copy_(value)
    return manifest["step"]


def open_metrics(path: Path, step: int) -> Path:
    """metrics.jsonl cut back to the rows before `step`, since a killed run may have logged past its last checkpoint."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows[:step] if row.startswith("{") and row.endswith("}")]
    draft = path.with_name(f".{path.name}")
    draft.write_text("".join(row + "\n" for row in kept))
    os.replace(draft, path)
    return path
