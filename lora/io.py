"""LoRA files in and out. Every key of a file is used, dropped for a stated reason, or the file is refused.

`read` understands all dialects of `dialects.py`, mixed ones too; `write` writes one. Between them stands the value of
`adapter.py`, whose factors and scales are those of the file.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flux import checkpoint
from flux.checkpoint import listed, refuse, shown
from lora.adapter import Adapter, Bias, Dense, Dora, LoHa, LoKr, LowRank, Term, delta_bias, tensors_of
from lora.dialects import BOOKKEEPING, Key, Names, Place, Unknown, Unusable, parse

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


def read(path: Path, names: Names, strict: bool = True, alpha_fix: bool = False) -> tuple[dict[str, Adapter], Report]:
    """A file -> an adapter for each network it changes ("flux", "clip", "t5"), and a report.

    CheckpointError if a key is not understood (with strict=False it is reported as unused), if a factor lacks its other
    half, if shapes do not fit each other or the model, or if a number is not finite. `alpha_fix`: the trainer wrote q, k, v
    (and the MLP) block-diagonally in one layer, of k times the rank, but kept alpha, which is to be over the rank of one.
    """
    tensors = checkpoint.read(path)
    file = checkpoint.locate(path)
    metadata = checkpoint.read_header(file).metadata if file.suffix != ".json" else {}
    beside = Path(path) / "adapter_config.json" if Path(path).is_dir() else Path(path).with_name("adapter_config.json")
    return understand(tensors, names, metadata, path, beside, strict, alpha_fix)


def understand(tensors: Mapping[str, Tensor], names: Names, metadata: Mapping[str, str], path: Path,
               beside: Path | None = None, strict: bool = True, alpha_fix: bool = False
               ) -> tuple[dict[str, Adapter], Report]:
    """As `read`, of tensors by name. `beside`: PEFT's adapter_config.json, which may not be there."""
    report = Report(metadata=dict(metadata), dtypes=Counter(str(t.dtype).removeprefix("torch.") for t in
                                                           checkpoint.layout(tensors).values()))
    modules, places, norms = _understood(tensors, names, path, strict, report)
    replaced: dict[str, dict[str, Tensor]] = {}
    for name, key in norms.items():
        _replace(key, tensors[name], replaced, path)
        report.kinds["replaced parameter"] += 1
    checkpoint.check_finite(tensors, path)
    scale_of = _peft_scales(metadata, beside, path)
    adapters: dict[str, dict[str, list[Term]]] = {}
    taken: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for module, keys in modules.items():
        place = places[module]
        report.dialects[place.dialect] += 1
        start, stop = place.start, place.start + place.rows
        for first, last, other in taken.setdefault((place.part, place.layer), []):
            if start < last and first < stop:
                raise refuse(path, f"has {shown(other)} and {shown(module)}, which both change the same rows of "
                             f"{place.layer}", "each once", "mend the file")
        taken[place.part, place.layer].append((start, stop, module))
        terms = _terms(module, {role: tensors[key] for role, key in keys.items()}, place, scale_of,
                       _parts(names, place) if alpha_fix else 1, path)
        if place.part != "flux" and all(isinstance(term, LowRank) and not term.B.float().any() for term in terms):
            report.dropped |= dict.fromkeys(keys.values(), "zero, a text encoder that was not trained")
            continue
        for term in terms:
            inner = term.inner if isinstance(term, Dora) else term
            report.kinds["DoRA" if inner is not term else type(term).__name__] += 1
            if isinstance(inner, LowRank):
                report.ranks[inner.rank] += 1
            if hasattr(inner, "scale"):
                report.scales[inner.scale] += 1
        adapters.setdefault(place.part, {}).setdefault(place.layer, []).extend(terms)
    if not adapters and not replaced:
        raise refuse(path, "changes nothing, it is zero throughout", "a trained LoRA", "name another file")
    return {part: Adapter({layer: tuple(terms) for layer, terms in adapters.get(part, {}).items()},
                          replaced.get(part, {}), dict(metadata))
            for part in dict.fromkeys((*adapters, *replaced))}, report


def _understood(tensors: Mapping[str, Tensor], names: Names, path: Path, strict: bool, report: Report
                ) -> tuple[dict[str, dict[str, str]], dict[str, Place], dict[str, Key]]:
    """The keys of each module by their role, the module's place, and the keys of norms; refuses what nobody understands."""
    modules: dict[str, dict[str, str]] = {}
    places: dict[str, Place] = {}
    norms: dict[str, Key] = {}
    unusable = False
    for name in tensors:
        try:
            key = parse(name, names)
        except Unknown as why:
            if BOOKKEEPING.match(name):
                report.dropped[name] = "bookkeeping or an embedding, which no layer reads"
            else:
                report.unused[name] = str(why)
                unusable |= isinstance(why, Unusable)
            continue
        if key.role == "replace":
            norms[name] = key
            continue
        if key.role in modules.setdefault(key.module, {}):
            raise refuse(path, f"has {shown(key.module)} {key.role} twice, under two endings", "each once", "mend the file")
        modules[key.module][key.role] = name
        places[key.module] = key.place
    transformer = any(place.part == "flux" for place in places.values())  # checkpoints have norms, SDXL the same CLIP-L
    if report.unused and (strict or unusable or not transformer):
        first, why = next(iter(report.unused.items()))
        raise refuse(path, f"has {len(report.unused)} of {len(tensors)} keys that are not understood: {shown(first)} {why}"
                     + (f"; also {listed(list(report.unused)[1:], 2)}" if len(report.unused) > 1 else ""),
                     "a LoRA for FLUX.1", what_else(tensors))
    if not modules and not norms:
        raise refuse(path, "changes nothing, it has no layer of this model", "a LoRA for FLUX.1", "name another file")
    return modules, places, norms


def what_else(tensors: Mapping[str, Tensor]) -> str:
    """What to do about a file that is no LoRA for this model: says which model's it is, where its names tell."""
    text = "\n" + "\n".join(tensors)
    for marks, model in (
        (("lora_unet_input_blocks", "lora_unet_output_blocks", "lora_te2_text_model", "add_embedding"), "SDXL"),
        (("lora_unet_down_blocks", "unet.down_blocks", "lora_unet_up_blocks", "lora_unet_mid_block"), "Stable Diffusion"),
        (("joint_blocks", "joint_attn"), "SD3"),
        (("double_stream_modulation", "single_stream_modulation"), "FLUX.2"),
        ((".img_attn_qkv", ".img_attn_q.", "img_mlp_fc1", "individual_token_refiner"), "HunyuanVideo"),
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
    return "take one for FLUX.1"


def _replace(key: Key, value: Tensor, replaced: dict[str, dict[str, Tensor]], path: Path) -> None:
    part, name, shape = key.parameter
    if tuple(value.shape) != shape:
        raise refuse(path, f"has {shown(key.module)} of shape {tuple(value.shape)}", f"{shape}, as in this model",
                     "take a LoRA for it")
    if name in replaced.setdefault(part, {}):
        raise refuse(path, f"gives {name} twice", "each once", "mend the file")
    replaced[part][name] = value


def _parts(names: Names, place: Place) -> int:
    """How many parts another dialect has where this place has one."""
    starts = {other.start for places in names.dotted.values() for other in places
              if (other.part, other.layer) == (place.part, place.layer)}
    return sum(place.start <= start < place.start + place.rows for start in starts)


HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _needed(given: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which factors make up the change that is begun here."""
    if "A" in given or "B" in given:
        return "A", "B"
    if any(role.startswith("lokr_") for role in given):
        return sum(((w,) if w in given else (f"{w}_a", f"{w}_b") for w in ("lokr_w1", "lokr_w2")), ())
    if any(role.startswith("hada_") for role in given):
        return HADA
    return ("dense",) if "dense" in given else ()


def _terms(module: str, roles: dict[str, Tensor], place: Place, scale_of, parts: int, path: Path) -> list[Term]:
    """The tensors of one module as terms, checked against each other and the model."""
    def wrong(what: str, expected: str) -> checkpoint.CheckpointError:
        return refuse(path, f"has {shown(module)} {what}", expected, "take a whole LoRA for this model")

    given = {role: tensor.flatten(2).squeeze(2) if tensor.ndim == 4 and tensor.shape[2:].numel() == 1 else tensor
             for role, tensor in roles.items()}
    needed = _needed(given)
    if missing := set(needed) - given.keys():
        raise wrong(f"without {', '.join(sorted(missing))}", "both factors")
    also = {"alpha", "scalar", "magnitude", "bias", "reshape"} if needed else {"alpha", "bias"}
    if extra := given.keys() - set(needed) - also:
        raise wrong(f"with {', '.join(sorted(extra))} and no more or something else", "one whole change")
    for role in needed:
        if given[role].ndim != 2 or 0 in given[role].shape:
            raise wrong(f"{role} of shape {tuple(given[role].shape)}", "a matrix of rank 1 or more")
    terms: list[Term] = []
    if needed:
        term, rank = _change({role: given[role] for role in needed}, wrong)
        if "reshape" in given and given["reshape"].flatten().tolist() != list(term.shape):
            raise wrong(f"for a weight of {given['reshape'].flatten().tolist()[:4]}", f"{list(term.shape)}, as its factors")
        if rank and rank % parts:
            raise wrong(f"of rank {rank}", f"a multiple of its {parts} parts, or no alpha_fix")
        term = replace(_fitted(term, place, wrong), start=place.start,
                       scale=_scale(module, given, rank and rank // parts, scale_of, wrong))
        terms = [_dora(term, roles["magnitude"], place, wrong) if "magnitude" in given else term]
    if "bias" in given:
        value = given["bias"].flatten()
        if len(value) != place.rows:
            raise wrong(f"with a bias of {len(value)}", f"{place.rows}")
        terms.append(Bias(_swapped(value) if place.swapped else value, place.start))
    if not terms:
        raise wrong("with nothing but alpha", "factors")
    return terms


def _change(given: Mapping[str, Tensor], wrong) -> tuple[Term, int | None]:
    """The term that factors make, and what alpha is to be divided by; None where alpha means nothing."""
    def product(*names: str) -> tuple[Tensor, ...]:
        factors = tuple(given[name] for name in names)
        if len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0]:
            raise wrong(" and ".join(f"{name} {tuple(given[name].shape)}" for name in names), "the same rank in both")
        return factors

    if "A" in given:
        B, A = product("B", "A")
        return LowRank(A, B), A.shape[0]
    if "dense" in given:
        return Dense(given["dense"]), None
    if "hada_w1_a" in given:
        w1, w2 = product(*HADA[:2]), product(*HADA[2:])
        if (w1[0].shape[0], w1[1].shape[1]) != (w2[0].shape[0], w2[1].shape[1]):
            raise wrong("factors that do not fit each other", "two products of the same shape")
        return LoHa(w1, w2), w1[1].shape[0]
    w1, w2 = (product(*(name for name in given if name.startswith(w))) for w in ("lokr_w1", "lokr_w2"))
    rank = next((pair[1].shape[0] for pair in (w2, w1) if len(pair) == 2), None)
    return LoKr(w1[0] if len(w1) == 1 else w1[0].float() @ w1[1].float(), w2), rank


def _fitted(term: Term, place: Place, wrong) -> Term:
    """As many inputs, and rows in the order, that the layer has."""
    if isinstance(term, LowRank):
        A = F.pad(term.A, (0, place.columns - place.narrower)) if term.A.shape[1] == place.narrower else term.A
        term = LowRank(A, term.B)
    if place.swapped:
        if isinstance(term, LoKr) and len(term.w1) % 2:
            raise wrong(f"as LoKr of {len(term.w1)} blocks of rows", "an even number, whose halves can be exchanged")
        term = _exchanged(term)
    rows, columns = term.shape
    if rows != place.rows or columns < place.columns or columns > place.columns and not place.wider:
        raise wrong(f"for {columns} inputs and {rows} outputs", f"{place.columns} and {place.rows}")
    return term


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _exchanged(term: Term) -> Term:
    """With the two halves of its rows the other way round."""
    if isinstance(term, LowRank):
        return replace(term, B=_swapped(term.B))
    if isinstance(term, LoKr):  # its rows come in blocks, one for each row of w1
        return replace(term, w1=_swapped(term.w1))
    if isinstance(term, LoHa):
        return replace(term, w1=(_swapped(term.w1[0]), term.w1[1]), w2=(_swapped(term.w2[0]), term.w2[1]))
    return replace(term, weight=_swapped(term.weight))


def _scale(module: str, given: Mapping[str, Tensor], rank: int | None, scale_of, wrong) -> float:
    """alpha / rank; 1 where alpha is absent or 0; PEFT's metadata where there is no alpha; times a learned scalar."""
    for name in ("alpha", "scalar"):
        if name in given and given[name].numel() != 1:
            raise wrong(f"with {given[name].numel()} numbers as {name}", "one number")
    alpha = given["alpha"].item() if "alpha" in given else 0.0
    if not math.isfinite(alpha) or alpha < 0:
        raise wrong(f"with alpha {alpha:g}", "a number of 0 or more")
    scale = (alpha / rank if alpha else scale_of(module, rank)) if rank else 1.0
    scale *= given["scalar"].item() if "scalar" in given else 1.0
    if abs(scale) > torch.finfo(torch.float32).max:
        raise wrong(f"with a scale of {scale:g}", "one that float32 can hold")
    return scale


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
    """(module, rank) -> lora_alpha / rank, or / sqrt(rank), as PEFT's configuration says; 1 without one.

    diffusers joins the configurations of several networks and puts the network's name before each setting.
    """
    config, found = {}, {}
    try:
        if PEFT in metadata:
            config = json.loads(metadata[PEFT])
        elif beside is not None and beside.is_file() and beside.stat().st_size < 1 << 20:
            config = json.loads(beside.read_text(encoding="utf-8"))
        for part in ("transformer.", "text_encoder.", "text_encoder_2.", ""):
            if isinstance(config, dict) and f"{part}lora_alpha" in config:
                found[part] = (float(config[f"{part}lora_alpha"]), bool(config.get(f"{part}use_rslora")), {
                    name: float(value) for name, value in (config.get(f"{part}alpha_pattern") or {}).items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise refuse(path, f"has a configuration of PEFT that cannot be read ({shown(str(error))})", "JSON with lora_alpha",
                     "remove it, then scales are 1") from error
    if not all(math.isfinite(value) and value >= 0 for alpha, _, patterns in found.values()
               for value in (alpha, *patterns.values())):
        raise refuse(path, "has a lora_alpha that is no number of 0 or more", "such a number", "mend its configuration")

    def scale(module: str, rank: int) -> float:
        part = next((part for part in ("text_encoder.", "text_encoder_2.") if module.startswith(part)), "transformer.")
        alpha, stabilised, patterns = found.get(part) or found.get("") or (0.0, False, {})
        alpha = next((value for name, value in patterns.items() if f".{module}".endswith(f".{name}")), alpha)
        return alpha / (math.sqrt(rank) if stabilised else rank) if alpha else 1.0
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
                tensors = _tensors_of(term, place, endings, with_alpha)
                if dialect == "comfy" and not isinstance(term, Bias) and term.shape[1] > place.columns:
                    tensors[".reshape_weight"] = torch.tensor(term.shape)  # to which ComfyUI pads the layer
                for ending, tensor in tensors.items():
                    if stem + ending in out:
                        raise checkpoint.CheckpointError(f"{layer} has two changes of the same rows; expected one for "
                                                         f"{dialect}: merge them first, python -m lora resize")
                    out[stem + ending] = tensor
        if adapter.replaced and dialect not in ("bfl", "comfy", "diffusers"):
            raise checkpoint.CheckpointError(f"{len(adapter.replaced)} norms are replaced, which {dialect} has no word for; "
                                             "expected --to bfl, comfy or diffusers")
        for name, value in adapter.replaced.items():
            spelling = next(spelling for spelling, (_, ours, _) in names.parameters.items() if ours == name and
                            (spelling != name) == (family == "diffusers"))
            out[prefix + spelling + (".set_weight" if dialect == "comfy" else "")] = value  # else ComfyUI passes it over
    return out


def _placed(terms: tuple[Term, ...], spellings: list[tuple[str, Place]], layer: str, dialect: str):
    """(spelling, place, term): each term under the name that means its rows; parts put together, or cut, where needed."""
    low, biases = [t for t in terms if isinstance(t, LowRank)], [t for t in terms if isinstance(t, Bias)]
    rest = [t for t in terms if not isinstance(t, LowRank | Bias)]
    exact = {(place.start, place.rows): (spelling, place) for spelling, place in spellings}
    if len(spellings) == 1:
        (_, place), = spellings
        stop = place.start + place.rows

        def joined(some: list, join) -> list:
            whole = len(some) == 1 and (some[0].start, some[0].shape[0]) in exact
            fit = all(place.start <= term.start and term.start + term.shape[0] <= stop for term in some)
            return [join(some, place.start, place.rows)] if some and fit and not whole else some
        low, biases = joined(low, fused), joined(biases, fused_biases)
    for term in (*low, *biases, *rest):
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
    shared = all(term.A is terms[0].A or torch.equal(term.A.float(), terms[0].A.float()) for term in terms)
    spans = [(term.start, term.start + term.shape[0]) for term in terms]
    apart = all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(spans) for b in spans[:i])
    dtype = torch.float32 if any(B.dtype != terms[0].B.dtype for B in factor.values()) else factor[id(terms[0])].dtype
    width = terms[0].rank if shared and apart else sum(term.rank for term in terms)
    B, first = torch.zeros(rows, width, dtype=dtype), 0
    for term in terms:
        column = slice(None) if shared and apart else slice(first, first + term.rank)
        B[term.start - start:term.start - start + term.shape[0], column] = factor[id(term)].to(dtype)
        first += term.rank
    if shared and apart:
        return LowRank(terms[0].A, B, scale, start)
    wide = max(term.A.shape[1] for term in terms)
    kind = terms[0].A.dtype if len({term.A.dtype for term in terms}) == 1 else torch.float32
    return LowRank(torch.cat([F.pad(term.A.to(kind), (0, wide - term.A.shape[1])) for term in terms]), B, scale, start)


def fused_biases(terms: list[Bias], start: int, rows: int) -> Bias:
    value = delta_bias(terms, start + rows)[start:]
    return Bias(value if any(term.value.dtype != terms[0].value.dtype for term in terms) else value.to(terms[0].value.dtype),
                start)


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
    if place.swapped:
        if isinstance(term, LoKr) and len(term.w1) % 2:
            raise checkpoint.CheckpointError(f"there is no word for LoKr of {len(term.w1)} blocks of rows on {place.layer}, "
                                             "whose halves diffusers exchanges; expected another --to, such as kohya")
        term = _exchanged(term)
    if isinstance(term, LowRank):
        B = term.B
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
    return len(adapter.layers), sum(t.numel() for terms in adapter.layers.values() for term in terms
                                    for t in tensors_of(term))
