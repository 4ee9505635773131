"""What LucidFlux's branches cost a step: `python -m flux.bench_restoring`, by default at half of FLUX.1-dev's width.

The plain step has the same tokens, text, image and those of SigLIP. Both run in turn, with random weights; every round
gives one ratio.
"""

import argparse
from dataclasses import replace
from statistics import median

import torch

from flux import bench, conditioning, device, lucidflux
from flux.config import LUCID, FluxConfig
from flux.lucidflux import LucidFlux
from flux.model import Flux


@torch.inference_mode()
def ratios(options: argparse.Namespace, place: torch.device) -> tuple[list[float], float]:
    """Conditioned over plain, of each round; median seconds of the plain step."""
    dtype, rows = device.DTYPES[options.dtype], options.edge // 16
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # billions of numbers are drawn as they will be used
    try:
        config = FluxConfig(hidden_size=options.hidden, num_heads=options.hidden // 128, depth=options.depth,
                            depth_single_blocks=options.single)
        model = Flux(config).to(place).eval()
        lucid = LucidFlux(config, replace(LUCID["dev"], depth=options.branch)).to(place).eval()
        txt, vec = torch.randn(1, options.text_tokens, config.context_in_dim), torch.randn(1, config.vec_in_dim)
        cond = conditioning.condition(txt.to(place), vec.to(place), options.edge, options.edge, 1.0)
        pixels = torch.randn(2, 1, 3, options.edge, options.edge, device=place)
        seen = torch.randn(1, options.seen_tokens, LUCID["dev"].siglip.hidden_size, device=place)
        img, t = torch.randn(1, rows * rows, config.in_channels, device=place), torch.full((1,), 0.75, device=place)
    finally:
        torch.set_default_dtype(torch.float32)
    given = lucidflux.given(lucid, cond, *pixels, seen)
    plain = conditioning.velocity(model, conditioning.with_image_tokens(cond, given.tokens))
    whole = lucidflux.velocity(model, lucid, given, lucidflux.tables(lucid, [0.75, 0.0]))
    spent = {plain: [], whole: []}
    for _ in range(options.rounds + 1):
        for v, seconds in spent.items():
            seconds.append(bench.timed(lambda v=v: v(img, t), place))
    pairs = list(zip(spent[whole][1:], spent[plain][1:], strict=True))  # the first warms up
    return [a / b for a, b in pairs], median(b for _, b in pairs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux.bench_restoring", description="A step with LucidFlux's branches "
                                     "over a plain one of the same tokens.")
    for name, value, what in (("hidden", 1536, "width, a multiple of 128"), ("depth", 19, "double blocks"),
                              ("single", 38, "single blocks"), ("branch", 2, "blocks of each branch"),
                              ("edge", 256, "pixels, a multiple of 16"), ("text-tokens", 128, "of the prompt"),
                              ("seen-tokens", 256, "of SigLIP"), ("rounds", 5, "that count")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--dtype", choices=device.DTYPES, default="bf16", help="of weights and inputs (bf16)")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.hidden % 128 or options.edge % 16:
        parser.error(f"--rounds {options.rounds} --hidden {options.hidden} --edge {options.edge}: expected 1 or more, a "
                     "multiple of 128 and one of 16")
    place = device.choose("auto")[0]
    found, seconds = ratios(options, place)
    tokens = f"{(options.edge // 16) ** 2} + {options.text_tokens} + {options.seen_tokens} tokens"
    print(f"{bench.processor(place)}, torch {torch.__version__}, {options.dtype}, width {options.hidden}, {options.depth} + "
          f"{options.single} blocks, {tokens}:\nplain step {seconds:.2f} s, with two branches of {options.branch} blocks "
          f"{median(found):.3f} times that ({min(found):.3f}-{max(found):.3f})")


if __name__ == "__main__":
    main()
