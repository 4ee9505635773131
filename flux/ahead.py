"""The next batch, made while the last one is used."""

from concurrent.futures import ThreadPoolExecutor


class Ahead:
    """`task.batch(step, micro)`, with the next one begun in a thread while this one is used: rendering takes its time."""

    def __init__(self, task, share: range):
        self.task, self.share, self.begun, self.pool = task, share, {}, ThreadPoolExecutor(1)

    def __call__(self, step: int, micro: int):
        future = self.begun.pop((step, micro), None) or self.pool.submit(self.task.batch, step, micro)
        batch, last = future.result(), micro == self.share[-1]
        after = (step + 1, self.share[0]) if last else (step, micro + self.share.step)
        self.begun = {after: self.pool.submit(self.task.batch, *after)}
        return batch
