"""Which device, and which dtype on it."""

import torch

from flux.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Flags -> device and dtype. auto: the first GPU there is, in bf16; else the CPU, in fp32."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} is not here ({str(error).splitlines()[0]}), expected cpu, cuda, cuda:1 or mps; "
                        "take --device cpu") from error
    if dtype == "auto":
        dtype = "fp32" if place.type == "cpu" else "bf16"
    return place, DTYPES[dtype]
