"""How far a picture is from the one it should be: PSNR, SSIM (Wang et al. 2004), LPIPS (arXiv 1801.03924).

Pictures are (B, 3, H, W) in [0, 1]; every measure is one number per picture, (B,). LPIPS needs weights that are not ours:
torchvision's AlexNet and the authors' linear layers, as files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import checkpoint
from flux.errors import UserError

K1, K2, WINDOW, SIGMA = 0.01, 0.03, 11, 1.5  # of SSIM, as published


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Decibels against a peak of 1; infinite for equal pictures. where (B, 1, H, W): which pixels count, NaN for none."""
    error = (a - b).double().square()
    if where is None:
        return -10 * error.flatten(1).mean(1).log10()
    return -10 * ((error * where).flatten(1).sum(1) / (3 * where.flatten(1).sum(1))).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the index over colours and all windows of 11 x 11 pixels inside the picture, each weighted by a Gaussian."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    bell = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(a.shape[1], 1, -1, -1)
    assert min(a.shape[2:]) >= WINDOW, f"{tuple(a.shape)}: a picture smaller than SSIM's window"

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=a.shape[1])

    a, b = a.double(), b.double()
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = K1**2, K2**2
    index = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return index.flatten(1).mean(1)


def of_pixels(measure: Callable[[Tensor, Tensor], Tensor], a: np.ndarray, b: np.ndarray) -> float:
    """One of the above for two pictures (H, W, 3) or their greys (H, W), in 0 .. 255."""
    shown = (torch.from_numpy(np.array(x if x.ndim == 3 else x[..., None])) for x in (a, b))
    return measure(*(x.permute(2, 0, 1)[None].double() / 255 for x in shown)).item()


class Lpips(nn.Module):
    """Distance of AlexNet's features after each of its five ReLUs: normalised, squared difference, weighted, averaged."""

    SHAPES = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))  # out, in, edge of each convolution
    NUMBERS = (0, 3, 6, 8, 10)  # of them in torchvision's `features`

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(columns, rows, edge, stride=4 if edge == 11 else 1,
                                                    padding=2 if edge > 3 else 1) for rows, columns, edge in self.SHAPES)
        self.linear = nn.ParameterList(torch.zeros(1, rows, 1, 1) for rows, _, _ in self.SHAPES)
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, total = (torch.cat((a, b)) * 2 - 1 - self.shift) / self.scale, 0
        for i, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if i in (1, 2) else x))
            one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            total = total + ((one - other).square() * self.linear[i]).sum(1).flatten(1).mean(1)
        return total


def load_lpips(paths: Sequence[Path]) -> Lpips | None:
    """From torchvision's alexnet and lpips' alex.pth, in two files or one; None without files."""
    if not paths:
        return None
    state = {key: tensor for path in paths for key, tensor in checkpoint.read(path).items()}
    names = {f"convolutions.{i}.{part}": f"features.{number}.{part}" for i, number in enumerate(Lpips.NUMBERS)
             for part in ("weight", "bias")} | {f"linear.{i}": f"lin{i}.model.1.weight" for i in range(5)}
    network = Lpips()
    own = {name: tensor.shape for name, tensor in network.named_parameters()}
    wrong = [theirs for name, theirs in names.items() if theirs not in state or state[theirs].shape != own[name]]
    if wrong:
        raise UserError(f"--lpips {', '.join(map(str, paths))}: {wrong[0]} is missing or of another shape "
                        f"({len(wrong)} are), expected torchvision's alexnet and the alex.pth of lpips 0.1; name both")
    network.load_state_dict({name: state[theirs].float() for name, theirs in names.items()})
    return network.eval()
