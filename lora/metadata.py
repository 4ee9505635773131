"""What a LoRA file says of itself: the fields that other programs read, and how it was made."""

import json
from collections.abc import Mapping
from pathlib import Path

from flux import checkpoint
from lora.adapter import Adapter, LowRank

LIMIT = 64 << 10  # bytes of all metadata


def about(adapter: Adapter, title: str, base: str, made: Mapping[str, object], parents: Mapping[str, Path] | None = None,
          extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Header fields of a LoRA file, under 64 kB: Stability's modelspec, kohya's ss_*, and `minflux`, one JSON text.

    base: the preset it was made for. made: command and settings. parents: the files it was computed from.
    """
    ranks = [term.rank for terms in adapter.layers.values() for term in terms if isinstance(term, LowRank)]
    alphas = [term.scale * term.rank for terms in adapter.layers.values() for term in terms if isinstance(term, LowRank)]
    files = {name: checkpoint.fingerprint(path) for name, path in (parents or {}).items() if path.is_file()}
    fields = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-1-{base}/lora",
        "modelspec.implementation": "minflux",
        "modelspec.title": title[:200],
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(max(ranks, default=0)),
        "ss_network_alpha": f"{max(alphas, default=0.0):g}",
        "ss_base_model_version": f"flux1-{base}",
        **(extra or {}),
        "minflux": json.dumps({**made, "parents": files}, default=str),
    }
    for name in sorted(fields, key=lambda name: -len(fields[name])):  # what is too long goes first, whole
        if sum(len(key.encode()) + len(value.encode()) for key, value in fields.items()) < LIMIT:
            break
        del fields[name]
    return fields
