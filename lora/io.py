"""LoRA files in and out. Every key of a file is used, dropped for a stated reason, or the file is refused.

`read` understands all dialects of `dialects.py`, mixed ones too; `write` writes one. Between them stands the value of
`adapter.py`, whose factors and scales are those of the file.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flux import checkpoint
from flux.checkpoint import listed, refuse, shown
from lora.adapter import Adapter, Bias, Dense, Dora, LoHa, LoKr, LowRank, Term, tensors_of
from lora.dialects import BOOKKEEPING, Key, Names, Place, Unknown, parse

PEFT = "lora_adapter_metadata"  # where diffusers keeps rank and alpha, in the header


@dataclass
class Report:
    """What a file is and what became of its keys."""

    dialects: Counter = field(default_factory=Counter)  # spelling families, by modules
    kinds: Counter = field(default_factory=Counter)  # kinds of terms
    ranks: Counter = field(default_factory=Counter)
    scales: Counter = field(default_factory=Counter)
    dtypes: Counter = field(default_factory=Counter)
    dropped: dict[str, str] = field(default_factory=dict)  # key: why
    unused: dict[str, str] = field(default_factory=dict)  # keys that nobody understands, only if not strict
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: Path, names: Names, strict: bool = True, alpha_fix: int = 1) -> tuple[dict[str, Adapter], Report]:
    """A file -> an adapter for each network it changes ("flux", "clip", "t5"), and a report.

    CheckpointError if a key is not understood (with strict=False it is reported as unused), if a factor lacks its other
    half, if shapes do not fit each other or the model, or if a number is not finite. `alpha_fix`: what to multiply scales
    with, for trainers that write q, k and v block-diagonally in one layer of k times the rank, but keep alpha.
    """
    tensors = checkpoint.read(path)
    file = checkpoint.locate(path)
    metadata = checkpoint.read_header(file).metadata if file.suffix != ".json" else {}
    beside = Path(path) / "adapter_config.json" if Path(path).is_dir() else Path(path).with_name("adapter_config.json")
    return understand(tensors, names, metadata, path, beside, strict, alpha_fix)


def understand(tensors: Mapping[str, Tensor], names: Names, metadata: Mapping[str, str], path: Path,
               beside: Path | None = None, strict: bool = True, alpha_fix: int = 1) -> tuple[dict[str, Adapter], Report]:
    """As `read`, of tensors by name. `beside`: PEFT's adapter_config.json, which may not be there."""
    modules: dict[str, dict[str, Tensor]] = {}
    places: dict[str, Place] = {}
    replaced: dict[str, dict[str, Tensor]] = {}
    report = Report(metadata=dict(metadata), dtypes=Counter(str(t.dtype).removeprefix("torch.") for t in
                                                           checkpoint.layout(tensors).values()))
    for name in tensors:
        try:
            key = parse(name, names)
        except Unknown as why:
            if BOOKKEEPING.match(name):
                report.dropped[name] = "bookkeeping or an embedding, which no layer reads"
            else:
                report.unused[name] = str(why)
            continue
        if key.role == "replace":
            _replace(key, tensors[name], replaced, path)
            report.kinds["replaced parameter"] += 1
            continue
        if key.role in modules.setdefault(key.module, {}):
            raise refuse(path, f"has {shown(key.module)} {key.role} twice, under two endings", "each once", "mend the file")
        modules[key.module][key.role] = tensors[name]
        places[key.module] = key.place
    if report.unused and (strict or not modules):
        first, why = next(iter(report.unused.items()))
        raise refuse(path, f"has {len(report.unused)} of {len(tensors)} keys that are not understood: {shown(first)} {why}"
                     + (f"; also {listed(list(report.unused)[1:], 2)}" if len(report.unused) > 1 else ""),
                     "a LoRA for FLUX.1", what_else(tensors))
    if not modules and not replaced:
        raise refuse(path, "changes nothing, it has no layer of this model", "a LoRA for FLUX.1", "name another file")
    checkpoint.check_finite(tensors, path)
    scale_of = _peft_scales(metadata, beside, path)
    adapters: dict[str, dict[str, list[Term]]] = {}
    taken: dict[tuple, str] = {}
    for module, roles in modules.items():
        place = places[module]
        report.dialects[place.dialect] += 1
        spot = (place.part, place.layer, place.start, place.rows)
        if spot in taken:
            raise refuse(path, f"has {shown(taken[spot])} and {shown(module)}, which both mean {place.layer}",
                         "each layer once", "mend the file")
        taken[spot] = module
        terms = _terms(module, roles, place, scale_of, alpha_fix, path)
        for term in terms:
            inner = term.inner if isinstance(term, Dora) else term
            report.kinds["DoRA" if inner is not term else type(term).__name__] += 1
            if isinstance(inner, LowRank):
                report.ranks[inner.rank] += 1
            if hasattr(inner, "scale"):
                report.scales[inner.scale] += 1
        adapters.setdefault(place.part, {}).setdefault(place.layer, []).extend(terms)
    return {part: Adapter({layer: tuple(terms) for layer, terms in adapters.get(part, {}).items()},
                          replaced.get(part, {}), dict(metadata))
            for part in dict.fromkeys((*adapters, *replaced))}, report


def what_else(tensors: Mapping[str, Tensor]) -> str:
    """What to do about a file that is no LoRA for this model: says which model's it is, where its names tell."""
    text = "\n" + "\n".join(tensors)
    for marks, model in (
        (("lora_unet_input_blocks", "lora_unet_output_blocks", "lora_te2_text_model", "add_embedding"), "SDXL"),
        (("lora_unet_down_blocks", "unet.down_blocks", "lora_unet_up_blocks", "lora_unet_mid_block"), "Stable Diffusion"),
        (("joint_blocks", "joint_attn"), "SD3"),
        (("double_stream_modulation", "single_stream_modulation"), "FLUX.2"),
        (("img_attn_qkv", "img_attn_q.", "individual_token_refiner"), "HunyuanVideo"),
        (("self_attn.q.", "self_attn_q.", "cross_attn"), "Wan"),
        (("context_refiner", "noise_refiner"), "Z-Image or Lumina"),
        (("distilled_guidance_layer",), "Chroma"),
        (("img_mlp.net", "txt_mlp.net", "img_mod.1"), "Qwen-Image"),
        (("transformer_blocks.0.attn1", "transformer_blocks_0_attn1"), "LTX-Video or PixArt"),
    ):
        if any(mark in text for mark in marks):
            return f"it looks like one for {model}, take one for FLUX.1"
    if not any(mark in text for mark in ("lora", "lokr", "hada", ".diff", "alpha", ".processor.")):
        return "it looks like no LoRA at all, name another file"
    return "take one for FLUX.1, or leave the keys out with --no-strict"


def _replace(key: Key, value: Tensor, replaced: dict[str, dict[str, Tensor]], path: Path) -> None:
    part, name, shape = key.parameter
    if tuple(value.shape) != shape:
        raise refuse(path, f"has {shown(key.module)} of shape {tuple(value.shape)}", f"{shape}, as in this model",
                     "take a LoRA for it")
    if name in replaced.setdefault(part, {}):
        raise refuse(path, f"gives {name} twice", "each once", "mend the file")
    replaced[part][name] = value


def _terms(module: str, roles: dict[str, Tensor], place: Place, scale_of, alpha_fix: int, path: Path) -> list[Term]:
    """The tensors of one module as terms, checked against each other and the model."""
    def wrong(what: str, expected: str) -> checkpoint.CheckpointError:
        return refuse(path, f"has {shown(module)} {what}", expected, "take a whole LoRA for this model")

    given = {role: tensor.flatten(2).squeeze(2) if tensor.ndim == 4 and tensor.shape[2:].numel() == 1 else tensor
             for role, tensor in roles.items()}
    kind = next((kind for kind, marks in (("low rank", ("A", "B")), ("LoKr", ("lokr_",)), ("LoHa", ("hada_",)),
                                          ("dense", ("dense",)))
                 if any(role == mark or mark[-1] == "_" and role.startswith(mark) for role in given for mark in marks)), None)
    own = {"low rank": {"A", "B"}, "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, "dense": {"dense"}}
    if kind == "LoKr":
        needed = {name for n in "12" for name in ((f"lokr_w{n}",) if f"lokr_w{n}" in given else
                                                  (f"lokr_w{n}_a", f"lokr_w{n}_b"))}
    else:
        needed = own.get(kind, set())
    if missing := needed - given.keys():
        raise wrong(f"without {', '.join(sorted(missing))}", "both factors")
    extra = given.keys() - needed - {"alpha", "scalar", "magnitude", "bias", "reshape"}
    if extra or kind is None and given.keys() - {"bias", "alpha"}:
        raise wrong(f"with {', '.join(sorted(extra or given))} that do not belong together", "one kind of change")
    for role in needed:
        if given[role].ndim != 2 or 0 in given[role].shape:
            raise wrong(f"{role} of shape {tuple(given[role].shape)}", "a matrix of rank 1 or more")

    rank, term = 1, None
    if kind == "low rank":
        A, B = given["A"], given["B"]
        if A.shape[0] != B.shape[1]:
            raise wrong(f"A {tuple(A.shape)} and B {tuple(B.shape)}", "the same rank in both")
        rank = A.shape[0]
        if place.narrower and A.shape[1] < place.columns:
            A = F.pad(A, (0, place.columns - A.shape[1]))
        if place.swapped:
            B = _swapped(B)
        term = LowRank(A, B, start=place.start)
    elif kind == "LoKr":
        def matrix(n):
            return (given[f"lokr_w{n}"],) if f"lokr_w{n}" in given else (given[f"lokr_w{n}_a"], given[f"lokr_w{n}_b"])
        for pair in (matrix(1), matrix(2)):
            if len(pair) == 2 and pair[0].shape[1] != pair[1].shape[0]:
                raise wrong(f"factors {tuple(pair[0].shape)} and {tuple(pair[1].shape)}", "factors that can be multiplied")
        w1, w2 = matrix(1), matrix(2)
        rank = w2[1].shape[0] if len(w2) == 2 else w1[1].shape[0] if len(w1) == 2 else None
        term = LoKr(w1[0] if len(w1) == 1 else (w1[0].float() @ w1[1].float()), w2, start=place.start)
    elif kind == "LoHa":
        w1, w2 = (given["hada_w1_a"], given["hada_w1_b"]), (given["hada_w2_a"], given["hada_w2_b"])
        if w1[0].shape[1] != w1[1].shape[0] or w2[0].shape[1] != w2[1].shape[0] or \
                (w1[0].shape[0], w1[1].shape[1]) != (w2[0].shape[0], w2[1].shape[1]):
            raise wrong("factors that do not fit each other", "two products of the same shape")
        rank, term = w1[1].shape[0], LoHa(w1, w2, start=place.start)
    elif kind == "dense":
        term = Dense(given["dense"], start=place.start)
    if term is not None:
        rows, columns = term.shape
        if rows != place.rows or columns < place.columns or columns > place.columns and not place.wider:
            raise wrong(f"for {columns} inputs and {rows} outputs", f"{place.columns} and {place.rows}")
        if place.swapped and kind != "low rank":
            raise wrong(f"as {kind}", "a low-rank pair, whose halves can be exchanged")
        term = _with_scale(term, _scale(module, given, rank, scale_of, wrong) * alpha_fix)
    terms = [] if term is None else [term]
    if "magnitude" in given:
        if term is None:
            raise wrong("with a magnitude alone", "the factors of DoRA")
        terms = [_dora(term, given["magnitude"], place, wrong)]
    if "bias" in given:
        value = given["bias"].flatten()
        if len(value) != place.rows:
            raise wrong(f"with a bias of {len(value)}", f"{place.rows}")
        terms.append(Bias(_swapped(value) if place.swapped else value, place.start))
    if not terms:
        raise wrong("with nothing but alpha", "factors")
    return terms


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _with_scale(term: Term, scale: float) -> Term:
    return type(term)(**{**vars(term), "scale": scale})


def _scale(module: str, given: Mapping[str, Tensor], rank: int | None, scale_of, wrong) -> float:
    """alpha / rank; 1 where alpha is absent or 0; PEFT's metadata where there is no alpha; times a learned scalar."""
    for name in ("alpha", "scalar"):
        if name in given and given[name].numel() != 1:
            raise wrong(f"with {given[name].numel()} numbers as {name}", "one number")
    alpha = given["alpha"].item() if "alpha" in given else 0.0
    if not math.isfinite(alpha) or alpha < 0:
        raise wrong(f"with alpha {alpha:g}", "a number of 0 or more")
    scalar = given["scalar"].item() if "scalar" in given else 1.0
    if alpha and rank:
        return alpha / rank * scalar
    return (scale_of(module, rank) if rank else 1.0) * scalar


def _dora(term: Term, magnitude: Tensor, place: Place, wrong) -> Dora:
    rows, columns = term.shape
    squeezed = [n for n in magnitude.shape if n != 1]
    along_columns = magnitude.numel() == columns and (magnitude.numel() != rows or magnitude.ndim == 2
                                                      and magnitude.shape[0] == 1)
    if len(squeezed) > 1 or magnitude.numel() not in (rows, columns):
        raise wrong(f"with a magnitude of shape {tuple(magnitude.shape)}", f"{rows} or {columns} numbers")
    values = magnitude.flatten()
    return Dora(term, values if along_columns or not place.swapped else _swapped(values), "in" if along_columns else "out")


def _peft_scales(metadata: Mapping[str, str], beside: Path | None, path: Path):
    """(module, rank) -> lora_alpha / rank, or / sqrt(rank), as PEFT's configuration says; 1 without one."""
    config = {}
    try:
        if PEFT in metadata:
            config = json.loads(metadata[PEFT])
        elif beside is not None and beside.is_file() and beside.stat().st_size < 1 << 20:
            config = json.loads(beside.read_text(encoding="utf-8"))
        for part in ("transformer.", ""):
            if isinstance(config, dict) and f"{part}lora_alpha" in config:
                alpha = float(config[f"{part}lora_alpha"])
                patterns = {str(name): float(value) for name, value in (config.get(f"{part}alpha_pattern") or {}).items()}
                stabilised = bool(config.get(f"{part}use_rslora"))
                break
        else:
            return lambda module, rank: 1.0
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise refuse(path, f"has a configuration of PEFT that cannot be read ({shown(str(error))})", "JSON with lora_alpha",
                     "remove it, then scales are 1") from error
    if not all(math.isfinite(value) and value >= 0 for value in (alpha, *patterns.values())):
        raise refuse(path, "has a lora_alpha that is no number of 0 or more", "such a number", "mend its configuration")

    def scale(module: str, rank: int) -> float:
        own = next((value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?{re.escape(name)}", module)), alpha)
        return (own / (math.sqrt(rank) if stabilised else rank)) if own else 1.0
    return scale


# --- out ---

WRITERS = {  # dialect: prefix, whose spellings, endings of A, B and a bias, whether alpha is written
    "kohya": ("lora_unet_", "bfl", (".lora_down.weight", ".lora_up.weight", ".diff_b"), True),
    "comfy": ("diffusion_model.", "bfl", (".lora_down.weight", ".lora_up.weight", ".diff_b"), True),
    "bfl": ("", "bfl", (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"), False),
    "diffusers": ("transformer.", "diffusers", (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"), False),
    "diffsynth": ("", "diffsynth", (".lora_A.default.weight", ".lora_B.default.weight", ".diff_b"), False),
    "xlabs": ("", "xlabs", (".down.weight", ".up.weight", ".diff_b"), False),
}


def write(path: Path, adapters: Mapping[str, Adapter], names: Names, dialect: str = "kohya",
          metadata: Mapping[str, str] | None = None) -> None:
    """One file in one dialect. Metadata: the adapters' own, and `metadata` over it."""
    about = {key: value for adapter in adapters.values() for key, value in adapter.metadata.items() if key != PEFT}
    checkpoint.save(path, to_tensors(adapters, names, dialect), about | dict(metadata or {}))


def to_tensors(adapters: Mapping[str, Adapter], names: Names, dialect: str) -> dict[str, Tensor]:
    """The tensors of that file. UserError if the dialect has no word for something."""
    prefix, family, endings, with_alpha = WRITERS[dialect]
    spelled: dict[tuple[str, str], list[tuple[str, Place]]] = {}
    for spelling, places in names.dotted.items():
        for place in places:
            if place.dialect in (family, "transformers"):
                same = spelled.setdefault((place.part, place.layer), [])
                if not any((place.start, place.rows) == (p.start, p.rows) for _, p in same):
                    same.append((spelling, place))
    out: dict[str, Tensor] = {}
    for part, adapter in adapters.items():
        before = prefix if part == "flux" else {"clip": "text_encoder.", "t5": "text_encoder_2."}[part]
        if dialect == "kohya" and part != "flux":
            before = {"clip": "lora_te1_", "t5": "lora_te3_"}[part]
        for layer, terms in adapter.layers.items():
            for spelling, place, term in _placed(terms, spelled.get((part, layer), []), layer, dialect):
                stem = before + (spelling.replace(".", "_") if before.startswith("lora_") else spelling)
                for ending, tensor in _tensors_of(term, place, endings, with_alpha).items():
                    if stem + ending in out:
                        raise checkpoint.CheckpointError(f"{layer} has two changes of the same rows; expected one for "
                                                         f"{dialect}: merge them first, python -m lora resize")
                    out[stem + ending] = tensor
        if adapter.replaced and dialect not in ("bfl", "comfy", "diffusers"):
            raise checkpoint.CheckpointError(f"{len(adapter.replaced)} norms are replaced, which {dialect} has no word for; "
                                             "expected --to bfl, comfy or diffusers")
        for name, value in adapter.replaced.items():
            out[prefix + next(spelling for spelling, (_, ours, _) in names.parameters.items() if ours == name and
                              (spelling != name) == (family == "diffusers"))] = value
    return out


def _placed(terms: tuple[Term, ...], spellings: list[tuple[str, Place]], layer: str, dialect: str):
    """(spelling, place, term): each term under the name that means its rows; parts put together, or cut, where needed."""
    low, rest = [t for t in terms if isinstance(t, LowRank)], [t for t in terms if not isinstance(t, LowRank)]
    exact = {(place.start, place.rows): (spelling, place) for spelling, place in spellings}
    if len(spellings) == 1 and (len(low) > 1 or low and (low[0].start, low[0].shape[0]) not in exact):
        (_, place), = spellings
        low = [fused(low, place.start, place.rows)] if all(place.start <= t.start and t.start + t.shape[0] <= place.start +
                                                             place.rows for t in low) else low
    for term in (*low, *rest):
        spot = (term.start, term.shape[0])
        if spot in exact:
            yield *exact[spot], term
            continue
        inside = [(spelling, place) for spelling, place in spellings if place.start >= term.start and
                  place.start + place.rows <= term.start + term.shape[0]]
        if not isinstance(term, LowRank | Bias) or sum(place.rows for _, place in inside) != term.shape[0]:
            raise checkpoint.CheckpointError(f"{dialect} has no word for {type(term).__name__} on rows {spot[0]} to "
                                             f"{sum(spot)} of {layer}; expected another --to, such as kohya or diffusers")
        for spelling, place in inside:
            yield spelling, place, cut(term, place.start, place.rows)


def fused(terms: list[LowRank], start: int, rows: int) -> LowRank:
    """Terms of parts of a layer as one pair: the same A shared, or A side by side and B block-wise. Scales are kept apart
    only if all are equal; otherwise they are multiplied into B, in float32."""
    scale = terms[0].scale if len({term.scale for term in terms}) == 1 else 1.0
    factor = {id(term): term.B if scale == term.scale else term.B.float() * term.scale for term in terms}
    shared = all(term.A is terms[0].A or torch.equal(term.A, terms[0].A) for term in terms)
    spans = [(term.start, term.start + term.shape[0]) for term in terms]
    apart = all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(spans) for b in spans[:i])
    dtype = torch.float32 if any(B.dtype != terms[0].B.dtype for B in factor.values()) else factor[id(terms[0])].dtype
    width = terms[0].rank if shared and apart else sum(term.rank for term in terms)
    B, first = torch.zeros(rows, width, dtype=dtype), 0
    for term in terms:
        column = slice(None) if shared and apart else slice(first, first + term.rank)
        B[term.start - start:term.start - start + term.shape[0], column] = factor[id(term)].to(dtype)
        first += term.rank
    A = terms[0].A if shared and apart else torch.cat([F.pad(term.A, (0, max(t.A.shape[1] for t in terms) - term.A.shape[1]))
                                                       for term in terms])
    return LowRank(A, B, scale, start)


def cut(term: LowRank | Bias, start: int, rows: int) -> LowRank | Bias:
    """The part of a term on some of its rows. Ranks that do nothing there, as of a block-diagonal B, are left out."""
    here = slice(start - term.start, start - term.start + rows)
    if isinstance(term, Bias):
        return Bias(term.value[here], start)
    B = term.B[here]
    used = B.ne(0).any(dim=0)
    if not used.any():
        used[0] = True
    return LowRank(term.A if used.all() else term.A[used], B if used.all() else B[:, used], term.scale, start)


def _tensors_of(term: Term, place: Place, endings: tuple[str, str, str], with_alpha: bool) -> dict[str, Tensor]:
    down, up, bias = endings
    if isinstance(term, Bias):
        return {bias: (_swapped(term.value) if place.swapped else term.value).contiguous()}
    if isinstance(term, Dora):
        swapped = place.swapped and term.axis == "out"
        magnitude = _swapped(term.magnitude) if swapped else term.magnitude
        shape = (-1, 1) if term.axis == "out" else (1, -1)
        return _tensors_of(term.inner, place, endings, with_alpha) | {".dora_scale": magnitude.reshape(shape).contiguous()}
    if isinstance(term, LowRank):
        B = _swapped(term.B) if place.swapped else term.B
        if with_alpha and term.scale > 0:
            return {down: term.A.contiguous(), up: B.contiguous(), ".alpha": torch.tensor(term.scale * term.rank)}
        return {down: term.A.contiguous(), up: _scaled(B, term.scale).contiguous()} | (
            {".alpha": torch.tensor(float(term.rank))} if with_alpha else {})
    if isinstance(term, LoKr):
        w2 = {".lokr_w2": term.w2[0]} if len(term.w2) == 1 else {".lokr_w2_a": term.w2[0], ".lokr_w2_b": term.w2[1]}
        return {".lokr_w1": _scaled(term.w1, term.scale), **w2} | (
            {".alpha": torch.tensor(float(term.w2[1].shape[0]))} if len(term.w2) == 2 else {})
    if isinstance(term, LoHa):
        return {".hada_w1_a": _scaled(term.w1[0], term.scale), ".hada_w1_b": term.w1[1], ".hada_w2_a": term.w2[0],
                ".hada_w2_b": term.w2[1], ".alpha": torch.tensor(float(term.w1[1].shape[0]))}
    return {".diff": _scaled(term.weight, term.scale)}


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """Times the scale, in the tensor's dtype if that is exact, else in float32."""
    if scale == 1:
        return tensor
    wide = tensor.float() * scale
    same = wide.to(tensor.dtype)
    return same if torch.equal(same.float(), wide) else wide


def summary(adapter: Adapter) -> tuple[int, int]:
    """Layers changed, and numbers stored."""
    return len(adapter.layers), sum(t.numel() for terms in adapter.layers.values() for term in terms for t in tensors_of(term))
