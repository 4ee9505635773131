"""Train: `python train.py RECIPE STAGE [flags]`; `python train.py --help` lists both.

The loop is below, and it is all there is: a task gives batches and a loss, the loop owns the optimiser, the moving
average, the checkpoints and what one looks at (metrics.jsonl, loss.png, samples/). A task (see `flux/recipes/`) has

    trainable() -> nn.Module        whose parameters that require grad are trained
    batch(step, micro) -> object    drawn from (seed, step, micro) alone, so that a resumed run sees the same data
    loss(batch) -> Tensor           (B,), one per sample, or a scalar
    held_out() -> list[object]      batches that training never sees, for a validation loss; optional
    ahead = True                    `batch` may run in a thread beside the step before; optional
    names(step, micro) -> list[str] of the samples in that batch, for messages; optional
    preview() -> PIL.Image | None   made with the averaged weights
    save(folder) -> None            the trained weights, averaged, in the form that the sampler loads

A stage without a loop, such as an evaluation, has `run()` instead of `task()`.
"""

import math
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flux import cli

if __name__ == "__main__" and (len(sys.argv) == 1 or cli.wants_help(sys.argv[1:])):
    cli.run(cli.training)  # help needs no torch, whose import takes seconds

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from flux import optimiser as optimisers  # noqa: E402
from flux import parallel, resume  # noqa: E402
from flux.ahead import Ahead  # noqa: E402
from flux.errors import UserError  # noqa: E402
from flux.guards import Guard  # noqa: E402
from flux.log import Log  # noqa: E402


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
        torch._foreach_lerp_(list(self.average.values()), [p.detach().float() for p in self.parameters.values()], 1 - decay)

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


def train(task, settings, run: Path) -> Counter:
    """Run a task to its last step in the folder `run`, from its newest checkpoint if there is one. Seconds by their use."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    team = parallel.join()
    share = team.share(settings.accumulate)
    if settings.shard and settings.optimiser == "muon":
        raise UserError("--shard with --optimiser muon, which steps with whole matrices; expected --optimiser adamw")
    engine = team.engine(task, settings.shard, settings.gradient_checkpointing)
    model = task.trainable()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = optimisers.build(model, settings)
    owned = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}, "the optimiser owns what requires grad"
    ema = Ema(parameters, settings.ema)
    step = resume.load(run, settings.resume, parameters, optimiser, ema.average, team, cli.as_dict(settings))
    with team.one_by_one():
        run.mkdir(parents=True, exist_ok=True)
        resume.cut_metrics(run / "metrics.jsonl", step)
        log = Log(run, settings, step, team.leads)
    device = next(iter(parameters.values())).device.type
    autocast = torch.autocast(device, torch.bfloat16) if settings.dtype == "bf16" else nullcontext()
    # on a CPU, flash attention's backward pass in bf16 is slower than plain products, and than its own in fp32
    kernels = sdpa_kernel(SDPBackend.MATH) if settings.dtype == "bf16" and device == "cpu" else nullcontext()
    guard = Guard(task, settings, parameters, run, log.rows)
    held_out = task.held_out() if settings.validate_every and hasattr(task, "held_out") else []
    batches = Ahead(task, share) if getattr(task, "ahead", False) else task.batch
    model.train()
    if step == 0 and team.leads:
        print(f"{run}: {sum(p.numel() for p in parameters.values()):,} parameters to train", flush=True)

    def save():
        with team.together():
            guard.state(step, ema.average, optimiser)
        resume.save(run, step, parameters, optimiser, ema.average, settings.keep, team, cli.as_dict(settings))

    @contextmanager
    def averaged():
        """The task with the averaged weights, not learning."""
        model.eval()
        with ema.applied(), torch.no_grad():
            yield parallel.bare(engine)
        model.train()

    def due(every):
        return every and (step % every == 0 or step == settings.steps)

    with signals_kept() as stopped, kernels:
        try:
            while step < settings.steps:
                started = time.perf_counter()
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(step, settings) * group.get("lr_scale", 1)
                total = 0.0
                for micro in share:
                    with team.together(), log.time("data"):
                        if stopped:
                            raise KeyboardInterrupt
                        batch = batches(step, micro)
                    with team.gathering(engine, last=micro == share[-1]), log.time("forward and backward"):
                        with autocast:
                            losses = engine("loss", batch)
                        with team.together():
                            guard.loss(step, micro, losses)
                        loss = losses.mean() / settings.accumulate
                        (loss * team.size).backward()  # the engine averages over the processes
                        total += loss.item()
                with log.time("optimiser"):
                    norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
                    size = parallel.whole(norm).item()
                    with team.together():
                        guard.gradients(step, size)
                    nn.utils.clip_grads_with_norm_(parameters.values(), settings.clip or math.inf, norm)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                with log.time("moving average"):
                    ema.update(step)
                step += 1
                row = {"step": step, "loss": round(team.total(total), 6), "lr": optimiser.param_groups[0]["lr"],
                       "grad_norm": round(size, 4), "seconds": round(time.perf_counter() - started, 4)}
                with log.time("validation and samples"):
                    if held_out and due(settings.validate_every):
                        with averaged() as act, autocast:
                            row["validation"] = sum(act("loss", batch).mean().item() for batch in held_out) / len(held_out)
                    log(row | guard.unusual(row))
                    if due(settings.sample_every) and (settings.shard or team.leads):
                        with averaged() as act:
                            log.sample(act("preview"), step)
                if due(settings.save_every):
                    with log.time("saving"):
                        log.plot()
                        save()
                log.spent["all"] += time.perf_counter() - started
        except KeyboardInterrupt:
            save()
            if team.leads:
                print(f"\nstopped at step {step} and saved; the same command goes on from there", file=sys.stderr)
            raise
        finally:
            log.close(finished=step == settings.steps)
    if settings.shard or team.leads:
        with ema.applied():
            model.eval()
            task.save(run)
    team.wait()  # for what the leader wrote: the next stage reads it
    return log.spent


def main(argv: list[str]) -> None:
    """One stage; or those that a recipe without a named stage lists; or, where there is no loop, what its `run` does."""
    name, named, chosen = cli.training(argv)
    team = parallel.join()
    for stage, settings in chosen.stages() if hasattr(chosen, "stages") else [(named, chosen)]:
        if team.leads:
            print(f"# {name} {stage}\n{cli.to_toml(settings)}", flush=True)
        if hasattr(settings, "run"):
            if team.leads or getattr(settings, "TOGETHER", False):
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
