"""Recorded tensors of the original implementations (tests/goldens/), and the rule by which ours must match them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent / "goldens"


@dataclass
class Golden:
    """One file: tensors by name without their prefix, `config`, and the tolerances it was recorded with."""

    config: dict
    tolerance: dict
    metadata: dict
    tensors: dict

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix):]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def weights(self):
        """The reference ran in float32 on exactly these bfloat16 values."""
        return {key: value.float() for key, value in self.part("weights.").items()}

    @property
    def inputs(self):
        return self.part("in.")

    @property
    def outputs(self):
        return self.part("out.")

    def tol(self, name: str, dtype: torch.dtype = torch.float32) -> float:
        if dtype == torch.float32:
            return self.tolerance.get("per_tensor_fp32", {}).get(name, self.tolerance["fp32"])
        return self.tolerance["bf16"] or 0.1

    def close(self, actual: torch.Tensor, name: str, tol: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Assert max|actual - reference| <= tol * max|reference| for `out.<name>`."""
        expected = self.outputs[name].double()
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        limit = self.tol(name, dtype) if tol is None else tol
        assert error <= limit, f"{name}: error {error:.3g} above {limit:.3g}"


def load(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Golden(json.loads(metadata["config"]), json.loads(metadata["tolerance"]), metadata, tensors)
