"""`python -m lora`: look at LoRA files, convert, add, subtract, compress and extract them.

Here meet the library, which knows no network, and the names of FLUX.1's layers.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flux import checkpoint, cli, lora_names, naming
from flux.config import DEMO, DEV, PRESETS, Preset
from flux.errors import UserError
from lora import algebra, io
from lora.adapter import Adapter, Bias, delta, delta_bias
from lora.metadata import about

LOADED = tuple[Preset, dict[str, Adapter], io.Report]


def open_lora(path: Path, model: str | None = None, strict: bool = True) -> LOADED:
    """With the sizes of `model`; without it, of whichever known transformer the file fits."""
    errors = []
    for preset in [PRESETS[model]] if model else [DEV, DEMO]:
        try:
            return preset, *io.read(path, lora_names.names(preset), strict)
        except checkpoint.CheckpointError as error:
            errors.append(error)
    raise errors[0]


def info(flags: argparse.Namespace) -> None:
    """What a file is: format, layers, ranks, scales, norms, and what of it would not be used."""
    preset, adapters, report = open_lora(flags.file, flags.model, strict=False)

    def counted(counter) -> str:
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) if count == 1 and len(counter) == 1
                         else f"{value:g} ({count})" if isinstance(value, float) else f"{value} ({count})"
                         for value, count in counter.most_common(6)) + (", ..." if len(counter) > 6 else "")
    print(f"{flags.file}: for {preset.name if preset is not DEV else 'FLUX.1'}, {flags.file.stat().st_size / 1e6:.1f} MB")
    for what, counter in (("format", report.dialects), ("changes", report.kinds), ("ranks", report.ranks),
                          ("scales alpha/rank", report.scales), ("stored as", report.dtypes)):
        print(f"  {what:<18} {counted(counter) or '-'}")
    for part, adapter in adapters.items():
        count, numbers = io.summary(adapter)
        print(f"  {part:<18} {count} layers, {numbers:,} numbers")
        for kind, layers in by_kind(adapter).items():
            try:
                norms = [algebra.norm(adapter, layer) for layer in layers]
                print(f"    {kind:<32} {len(layers):>3} layers, norm of the change {min(norms):.3g} to {max(norms):.3g}")
            except UserError:
                print(f"    {kind:<32} {len(layers):>3} layers")
    for name, why in {**report.dropped, **report.unused}.items():
        print(f"  not used: {checkpoint.shown(name)}: {why}")
    for name, value in sorted(report.metadata.items()):
        print(f"  {checkpoint.shown(name)}: {value[:100] if value.isprintable() else ascii(value[:100])}"
              + ("..." if len(value) > 100 else ""))


def by_kind(adapter: Adapter) -> dict[str, list[str]]:
    """Layers by their name without the block's number."""
    kinds = {}
    for layer in adapter.layers:
        kinds.setdefault(".".join("N" if word.isdigit() and i == 1 else word for i, word in enumerate(layer.split("."))),
                         []).append(layer)
    return kinds


def convert(flags: argparse.Namespace) -> None:
    """The same LoRA in another format."""
    preset, adapters, _ = open_lora(flags.source, flags.model)
    new_file(flags.target)
    io.write(flags.target, adapters, lora_names.names(preset), flags.to)
    print(f"{flags.target}: {flags.to}, {flags.target.stat().st_size / 1e6:.1f} MB")


def merge(flags: argparse.Namespace) -> None:
    """Several LoRAs as one; or, with --into, a checkpoint with them inside."""
    *sources, target = flags.files
    if not sources:
        raise UserError("merge has one file; expected LoRAs and then the file to write: a.safetensors:0.8 out.safetensors")
    new_file(Path(target))
    pairs = [cli.path_and_scale("merge", source, -100, 100) for source in sources]
    opened = [open_lora(path, flags.model) for path, _ in pairs]
    preset = opened[0][0]
    if flags.into:
        into_checkpoint(flags.into, Path(target), opened, [strength for _, strength in pairs])
        return
    parts = dict.fromkeys(part for _, adapters, _ in opened for part in adapters)
    total = {part: algebra.combined([adapters.get(part, Adapter()) for _, adapters, _ in opened],
                                    [strength for _, strength in pairs]) for part in parts}
    parents = {path.name: path for path, _ in pairs}
    finish(Path(target), total, preset, flags, parents, "merge")


def into_checkpoint(source: Path, target: Path, opened: list[LOADED], strengths: list[float]) -> None:
    """The transformer of `source` with the LoRAs in its weights, tensor by tensor, under BFL's names."""
    own = naming.select(checkpoint.read(source), "flux", source)
    loras = [(adapters.get("flux", Adapter()), s) for (_, adapters, _), s in zip(opened, strengths, strict=True)]
    layout = {name: tuple(tensor.shape) for name, tensor in checkpoint.layout(own).items()}
    for adapter, _ in loras:
        for layer, terms in adapter.layers.items():
            rows, columns = layout.get(f"{layer}.weight", (0, 0))
            if any(term.start + term.shape[0] > rows or not isinstance(term, Bias) and term.shape[1] != columns
                   for term in terms):
                raise UserError(f"{source} has no {layer} of the LoRA's shape; expected the model it was made for")
    checkpoint.save(target, Merged(own, loras))
    print(f"{target}: {source.name} with {len(loras)} LoRAs inside, {target.stat().st_size / 1e9:.2f} GB")


class Merged(Mapping):
    """Weights with LoRAs added, each made when asked for: 24 GB merge in the memory of one layer."""

    def __init__(self, own: Mapping[str, Tensor], loras: list[tuple[Adapter, float]]):
        self.own, self.loras = own, loras

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.own[name]
        layer, _, kind = name.rpartition(".")
        total = tensor.float()
        for adapter, strength in self.loras:
            terms = adapter.layers.get(layer, ()) if strength else ()
            if kind == "weight" and terms:
                total = total + strength * delta(terms, tuple(tensor.shape), tensor)
            elif kind == "bias" and (change := delta_bias(terms, len(tensor))) is not None:
                total = total + strength * change
            elif name in adapter.replaced and strength:
                total = adapter.replaced[name].float()
        return total.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def layout(self) -> dict[str, Tensor]:
        return checkpoint.layout(self.own)


def subtract(flags: argparse.Namespace) -> None:
    """What the first LoRA does beyond the second."""
    preset, ours, _ = open_lora(flags.file, flags.model)
    _, theirs, _ = open_lora(flags.other, preset.name)
    new_file(flags.target)
    total = {part: algebra.subtracted(ours.get(part, Adapter()), theirs.get(part, Adapter())) for part in {**ours, **theirs}}
    finish(flags.target, total, preset, flags, {path.name: path for path in (flags.file, flags.other)}, "subtract")


def resize(flags: argparse.Namespace) -> None:
    """The nearest LoRA of a smaller rank, or of the least rank that keeps a share of the energy."""
    if flags.rank is None and flags.energy is None:
        raise UserError("resize needs --rank or --energy; expected for instance --rank 16 or --energy 0.99")
    preset, adapters, _ = open_lora(flags.source, flags.model)
    new_file(flags.target)
    finish(flags.target, adapters, preset, flags, {flags.source.name: flags.source}, "resize")


def extract(flags: argparse.Namespace) -> None:
    """The LoRA between two checkpoints, the tuned minus the base."""
    base, tuned = (naming.select(checkpoint.read(path), "flux", path) for path in (flags.base, flags.tuned))
    here, there = checkpoint.layout(base), checkpoint.layout(tuned)
    if {name: t.shape for name, t in here.items()} != {name: t.shape for name, t in there.items()}:
        raise UserError(f"{flags.base} and {flags.tuned} differ in their tensors; expected a model and its fine-tuning")
    new_file(flags.target)
    preset = next((p for p in ([PRESETS[flags.model]] if flags.model else PRESETS.values())
                   if p.flux.hidden_size == here["img_in.weight"].shape[0]), DEV)
    layers = [name.removesuffix(".weight") for name, tensor in here.items() if name.endswith(".weight") and tensor.ndim == 2]
    with tqdm(total=len(layers), desc="layers", disable=None) as bar:
        adapter, kept = algebra.extracted(base, tuned, layers, flags.rank, flags.energy, done=lambda layer: bar.update())
    if not adapter.layers:
        raise UserError(f"{flags.tuned} has the weights of {flags.base}; expected two that differ")
    made = {"command": "extract", "rank": flags.rank, "energy": flags.energy}
    meta = about(adapter, flags.target.stem, preset.name, made, {p.name: p for p in (flags.base, flags.tuned)})
    io.write(flags.target, {"flux": adapter}, lora_names.names(preset), flags.to, meta)
    told(flags.target, kept)


def finish(target: Path, adapters: dict[str, Adapter], preset: Preset, flags: argparse.Namespace, parents: dict[str, Path],
           command: str) -> None:
    """Compress if asked to, write, and say what was kept."""
    kept = {}
    if flags.rank is not None or flags.energy is not None:
        layers = sum(len(adapter.layers) for adapter in adapters.values())
        with tqdm(total=layers, desc="layers", disable=None) as bar:
            for part, adapter in adapters.items():
                adapters[part], found = algebra.recompressed(adapter, flags.rank, flags.energy, lambda layer: bar.update())
                kept |= found
    made = {"command": command, "rank": flags.rank, "energy": flags.energy}
    io.write(target, adapters, lora_names.names(preset), flags.to,
             about(adapters.get("flux", Adapter()), target.stem, preset.name, made, parents))
    told(target, kept)


def told(target: Path, kept: dict[str, algebra.Kept]) -> None:
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB" + (
        f", ranks {min(k.rank for k in kept.values())} to {max(k.rank for k in kept.values())}, at least "
        f"{min(k.energy for k in kept.values()):.2%} of each layer's energy" if kept else ""))


def diff(flags: argparse.Namespace) -> None:
    """How far two LoRAs are from each other, by kind of layer."""
    preset, ours, _ = open_lora(flags.file, flags.model)
    _, theirs, _ = open_lora(flags.other, preset.name)
    print(f"{'layers':<36}{'norm 1':>9}{'norm 2':>9}{'difference':>12}{'cosine':>8}")
    for part in {**ours, **theirs}:
        a, b = ours.get(part, Adapter()), theirs.get(part, Adapter())
        kinds = by_kind(Adapter({**a.layers, **b.layers}))
        for kind, layers in {**kinds, f"all of {part}": [layer for group in kinds.values() for layer in group]}.items():
            aa, bb, ab = (sum(algebra.inner(x, y, layer) for layer in layers) for x, y in ((a, a), (b, b), (a, b)))
            apart = max(aa + bb - 2 * ab, 0.0) ** 0.5
            cosine = f"{ab / (aa * bb) ** 0.5:8.3f}" if aa > 0 and bb > 0 else f"{'-':>8}"
            print(f"{kind:<36}{aa ** 0.5:9.3g}{bb ** 0.5:9.3g}{apart:12.3g}{cosine}")


def new_file(path: Path) -> None:
    if path.exists():
        raise UserError(f"{checkpoint.shown(path)} is there already, expected a new file; name another one")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{checkpoint.shown(path)} would lie in a folder that is not there; expected one that is; make it")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lora", description="Look at LoRA files, convert and compute with them.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, *names: str, out: bool = True, ranks: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__)
        for name in names:
            sub.add_argument(name, type=Path)
        sub.add_argument("--model", choices=PRESETS, help="whose sizes are expected; default: dev's or the demo's")
        if out:
            sub.add_argument("--to", choices=io.WRITERS, default="kohya", help="format that is written (default: kohya)")
        if ranks:
            sub.add_argument("--rank", type=positive, help="rank at most")
            sub.add_argument("--energy", type=share, help="share of the squared norm to keep, such as 0.99")
        sub.set_defaults(run=run)
        return sub

    command(info, "file", out=False)
    command(convert, "source", "target")
    merging = command(merge, ranks=True)
    merging.add_argument("files", nargs="+", metavar="LORA[:STRENGTH] ... OUT")
    merging.add_argument("--into", type=Path, metavar="CHECKPOINT", help="write this transformer with the LoRAs inside")
    command(extract, "base", "tuned", "target", ranks=True)
    command(resize, "source", "target", ranks=True)
    command(subtract, "file", "other", "target", ranks=True)
    command(diff, "file", "other", out=False)
    flags = parser.parse_args(argv)
    with torch.inference_mode():
        flags.run(flags)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise ValueError
    return value


if __name__ == "__main__":
    cli.run(main)
