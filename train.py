"""Train: `python train.py RECIPE STAGE [flags]`; `python train.py --help` lists both.

The loop is below, and it is all there is: a task gives batches and a loss, the loop owns the optimiser, the moving
average, the checkpoints and what one looks at (metrics.jsonl, loss.png, samples/). A task (see `flux/recipes/`) has

    trainable() -> nn.Module        whose parameters that require grad are trained
    batch(step, micro) -> object    drawn from (seed, step, micro) alone, so that a resumed run sees the same data
    loss(batch) -> Tensor           (B,), one per sample, or a scalar
    names(step, micro) -> list[str] of the samples in that batch, for messages; optional
    preview() -> PIL.Image | None   made with the averaged weights
    save(folder) -> None            the trained weights, averaged, in the form that the sampler loads

A stage without a loop, such as an evaluation, has `run()` instead of `task()`.
"""

import json
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flux import cli

if __name__ == "__main__" and (len(sys.argv) == 1 or cli.wants_help(sys.argv[1:])):
    cli.run(cli.training)  # help needs no torch, whose import takes seconds

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from flux import optimiser as optimisers  # noqa: E402
from flux import parallel, pictures, resume  # noqa: E402
from flux.guards import Guard  # noqa: E402


def learning_rate(step: int, settings) -> float:
    """Linear warm-up, then constant or cosine to a hundredth."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "constant":
        return settings.lr * warm
    done = min(1.0, step / max(settings.steps, 1))
    return settings.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Ema:
    """Moving average of the trained parameters, in float32; its decay ramps up, so that early steps fade."""

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.average[name].lerp_(p.detach().float(), 1 - decay)

    @contextmanager
    def applied(self):
        """The averaged weights in place of the trained ones."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(kept[name])


@contextmanager
def signals_kept():
    """SIGINT and SIGTERM wait in a list: between the weights' update and the average's there is no state worth saving."""
    kept = []
    before = {number: signal.signal(number, lambda number, frame: kept.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """What a run tells while it goes on: a row of metrics.jsonl per step, the bar or lines of text. Silent for followers."""

    def __init__(self, run: Path, settings, step: int, leads: bool):
        self.run, self.settings, self.leads = run, settings, leads
        self.metrics = run / "metrics.jsonl"
        rows = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        self.rows = [json.loads(row) for row in rows[:step]]
        self.losses = [row["loss"] for row in self.rows]
        silent = not leads or (None if sys.stderr.isatty() else True)
        self.bar = tqdm(total=settings.steps, initial=step, desc=run.name, disable=silent)

    def __call__(self, row: dict) -> None:
        self.losses.append(row["loss"])
        if not self.leads:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.update()
        if row["step"] % self.settings.log_every == 0:
            smooth = f"{sum(self.losses[-100:]) / len(self.losses[-100:]):.4f}"
            self.bar.set_postfix(loss=smooth)
            if not sys.stderr.isatty():
                print(f"{self.run.name} step {row['step']}/{self.settings.steps} loss {smooth} {row['seconds']:.2f} s/step",
                      flush=True)


def train(task, settings, run: Path) -> None:
    """Run a task to its last step in the folder `run`, from its newest checkpoint if there is one."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    team = parallel.join()
    share = team.share(settings.accumulate)
    model = task.trainable()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = optimisers.build(model, settings)
    owned = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}, "the optimiser owns what requires grad"
    team.same(parameters.values())
    ema = Ema(parameters, settings.ema)
    with team.one_by_one():
        step = resume.load(run, settings.resume, parameters, optimiser, ema.average)
        run.mkdir(parents=True, exist_ok=True)
        resume.cut_metrics(run / "metrics.jsonl", step)
    device = next(iter(parameters.values())).device.type
    autocast = torch.autocast(device, torch.bfloat16) if settings.dtype == "bf16" else nullcontext()
    # on a CPU, flash attention's backward pass in bf16 is slower than plain products, and than its own in fp32
    kernels = sdpa_kernel(SDPBackend.MATH) if settings.dtype == "bf16" and device == "cpu" else nullcontext()
    log = Log(run, settings, step, team.leads)
    guard = Guard(task, settings, parameters, run, log.rows)
    model.train()
    if step == 0 and team.leads:
        print(f"{run}: {sum(p.numel() for p in parameters.values()):,} parameters to train", flush=True)

    def save():
        guard.state(step, ema.average, optimiser)
        if team.leads:
            resume.save(run, step, parameters, optimiser, ema.average, keep=settings.keep)

    with signals_kept() as stopped, kernels:
        try:
            while step < settings.steps:
                started = time.perf_counter()
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(step, settings)
                total = 0.0
                with team.together(device):
                    for micro in share:
                        if stopped:
                            raise KeyboardInterrupt
                        with autocast:
                            losses = task.loss(task.batch(step, micro))
                        guard.loss(step, micro, losses)
                        loss = losses.mean() / settings.accumulate
                        loss.backward()
                        total += loss.item()
                team.add_gradients(parameters.values())
                norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
                guard.gradients(step, norm.item())
                nn.utils.clip_grads_with_norm_(parameters.values(), settings.clip or math.inf, norm)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                ema.update(step)
                step += 1
                row = {"step": step, "loss": round(team.total(total, device), 6), "lr": optimiser.param_groups[0]["lr"],
                       "grad_norm": round(norm.item(), 4), "seconds": round(time.perf_counter() - started, 4)}
                log(row | guard.unusual(row))
                if team.leads and ((settings.sample_every and step % settings.sample_every == 0) or step == settings.steps):
                    look(task, ema, model, run, step, log.losses)
                if step % settings.save_every == 0 or step == settings.steps:
                    save()
        except KeyboardInterrupt:
            save()
            if team.leads:
                print(f"\nstopped at step {step} and saved; the same command goes on from there", file=sys.stderr)
            raise
        finally:
            log.bar.close()
    if team.leads:
        with ema.applied():
            model.eval()
            task.save(run)
    team.wait()  # for what the leader wrote: the next stage reads it


def look(task, ema: Ema, model: nn.Module, run: Path, step: int, losses: list[float]) -> None:
    """samples/step_*.png from the averaged weights, and loss.png."""
    model.eval()
    with ema.applied(), torch.inference_mode():
        picture = task.preview()
    model.train()
    (run / "samples").mkdir(exist_ok=True)
    if picture is not None:
        pictures.write_png(run / "samples" / f"step_{step:06d}.png", picture, None)
    window = max(1, min(100, len(losses) // 10))
    smooth, average = [], losses[0]
    for loss in losses:
        average += (loss - average) / window
        smooth.append(average)
    pictures.write_png(run / "loss.png", pictures.loss_plot(list(range(1, len(losses) + 1)), losses, smooth), None)


def main(argv: list[str]) -> None:
    """One stage; or those that a recipe without a named stage lists; or, where there is no loop, what its `run` does."""
    name, named, chosen = cli.training(argv)
    team = parallel.join()
    for stage, settings in chosen.stages() if hasattr(chosen, "stages") else [(named, chosen)]:
        if team.leads:
            print(f"# {name} {stage}\n{cli.to_toml(settings)}", flush=True)
        if hasattr(settings, "run"):
            if team.leads:
                settings.run()
            continue
        run = settings.out / "-".join(filter(None, (name, stage)))
        if team.leads:
            run.mkdir(parents=True, exist_ok=True)
            cli.write_toml(run / "config.toml", settings, f"python train.py {name} {stage}")
        train(settings.task(), settings, run)
    parallel.leave()


if __name__ == "__main__":
    cli.run(main)
