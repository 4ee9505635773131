"""Checkpoints of a training: a folder per save, whole or not there at all.

A save is written under a temporary name, synced, given its manifest of sizes and hashes last and renamed; then `latest` is
replaced, and only then are old ones deleted. All randomness comes from the step (flux/draws.py), so parameters, optimiser
and moving average are the whole state. Of split tensors (--shard) every process writes its own part, with
torch.distributed.checkpoint, into safetensors too; any number of processes reads either form.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux import cache, checkpoint, parallel
from flux.errors import UserError
from flux.optimiser import room_for_state

PARTS = ("model", "ema", "optimiser")
REMEDY = "name another with --resume, or start anew with --resume none"


def save(run: Path, step: int, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer, average: dict[str, Tensor],
         keep: int = 2, team: parallel.Team = parallel.ALONE, settings: Mapping | None = None) -> Path:
    """Write `run/checkpoints/step-000500`, then delete all but the newest `keep`. A full disk is an OSError, no change.

    settings: of the run, as JSON has them, for the manifest.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    draft = folder.with_name(f".{folder.name}")
    moments = {f"{key}.{name}": value for name, p in parameters.items() for key, value in optimiser.state[p].items()}
    parts = dict(zip(PARTS, (parameters, average, moments), strict=True))
    split = any(map(parallel.is_split, parameters.values()))
    with team.together():
        if team.leads:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    try:
        if split:
            for name, tensors in parts.items():
                _write_split(draft / name, tensors)
        with team.together():
            if team.leads:
                for name, tensors in () if split else parts.items():
                    checkpoint.save(draft / f"{name}.safetensors", tensors)
                _publish(run, draft, folder, keep, {"step": step, "settings": dict(settings or {})})
    finally:
        if team.leads:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _publish(run: Path, draft: Path, folder: Path, keep: int, about: dict) -> None:
    aside, latest = folder.with_name(f"{folder.name}-old"), folder.with_name("latest")
    files = {str(file.relative_to(draft)): {"bytes": file.stat().st_size, "sha256": cache.content(file)}
             for file in sorted(draft.rglob("*.safetensors"))}
    _write(draft / "manifest.json", json.dumps(about | {"files": files}, indent=1))
    if folder.exists():  # the run was started anew, or stopped where it began; `load` finds the old one meanwhile
        shutil.rmtree(aside, ignore_errors=True)
        latest.unlink(missing_ok=True)
        os.replace(folder, aside)
    os.replace(draft, folder)
    checkpoint.sync_folder(folder.parent)
    _write(latest, folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    kept = [manifest.parent for manifest in _by_age(run)[-keep:]]
    for old in folder.parent.glob("step-*"):
        if old not in kept:
            shutil.rmtree(old)


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


def _write_split(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    except dcp.CheckpointException as error:  # what any process met, raised in all of them
        numbers = {getattr(one, "errno", None) for one, _ in error.failures.values()}
        if not numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder.parents[1]).free
        raise OSError(errno.ENOSPC, f"no room: {needed} bytes needed, {free} free", str(folder)) from error


def _by_age(run: Path) -> list[Path]:
    """Manifests, oldest first: a run that was started anew counts its steps from 0, so steps do not tell."""
    return sorted((run / "checkpoints").glob("step-*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)


def load(run: Path, how: str, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer, average: dict[str, Tensor],
         team: parallel.Team = parallel.ALONE, settings: Mapping | None = None) -> int:
    """Fill everything from a checkpoint and return its step; 0 for a fresh start. What a killed save left is removed.

    `how`: auto (the newest of this run, if any), none, or the folder of a checkpoint, which must then be there. Which
    `settings` are not those of the save is said: from there on it is another run.
    """
    with team.one_by_one():
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
    step, before = _whole(folder)
    changed = [f"{name} {value} (was {before[name]})" for name, value in (settings or {}).items()
               if before.get(name, value) != value]
    if changed and team.leads:
        print(f"{folder}: going on from step {step} with {', '.join(changed)}", file=sys.stderr)
    (model, fill_model), (ema, fill_ema), (moments, fill_moments) = (_open(folder, part) for part in PARTS)
    expected = {name: p.shape for name, p in parameters.items()}
    for found in (model, ema):
        if {name: tensor.shape for name, tensor in found.items()} != expected:
            raise UserError(f"{folder} trained {len(found)} tensors, this run trains {len(expected)}, and their names or "
                            f"shapes differ; expected the same model; {REMEDY}")
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    states = {name: room_for_state(name, p, groups[id(p)], moments, f"{folder}; {REMEDY}") for name, p in parameters.items()}
    fill_model({name: p.detach() for name, p in parameters.items()})
    fill_ema(average)
    fill_moments({f"{key}.{name}": value for name, state in states.items() for key, value in state.items()})
    optimiser.state |= {parameters[name]: state for name, state in states.items() if state}
    return step


def _open(folder: Path, part: str) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], None]]:
    """The layout of one part of a checkpoint, on the meta device, and what fills tensors, split or not, with its numbers."""
    if not (folder / part).is_dir():
        found = checkpoint.read(folder / f"{part}.safetensors")
        return checkpoint.layout(found), lambda into: _fill(into, found)
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(folder / part)
    about = reader.read_metadata().state_dict_metadata
    layout = {name: torch.empty(each.size, dtype=each.properties.dtype, device="meta") for name, each in about.items()}
    return layout, lambda into: dcp.load(into, storage_reader=reader, no_dist=not torch.distributed.is_initialized())


def _fill(into: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, target in into.items():
        value = found[name]
        if parallel.is_split(target):
            value = torch.distributed.tensor.distribute_tensor(value.to(target.device), target.device_mesh,
                                                               target.placements, src_data_rank=None)
        target.copy_(value)


def _whole(folder: Path) -> tuple[int, dict]:
    """The step and settings of a checkpoint, all of whose files have the sizes and hashes that its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        step, settings = int(manifest["step"]), dict(manifest.get("settings", {}))
        files = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no whole checkpoint (its manifest.json is not there or damaged); expected a folder "
                        f"like checkpoints/step-000500; {REMEDY}") from error
    for part in PARTS:
        if not any(name == f"{part}.safetensors" or name.startswith(f"{part}/") for name in files):
            raise UserError(f"{folder}/manifest.json names no file of {part}; expected a whole checkpoint; {REMEDY}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or cache.content(path) != digest:
            raise UserError(f"{path} is not what its manifest says, {size} bytes with the sha256 {digest[:12]}; expected a "
                            f"whole checkpoint; {REMEDY}")
    return step, settings


def cut_metrics(path: Path, step: int) -> None:
    """metrics.jsonl cut back to the rows before `step`, since a killed run may have logged past its last checkpoint."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows[:step] if row.startswith("{") and row.endswith("}")]
    _write(path, "".join(row + "\n" for row in kept))
