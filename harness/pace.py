"""Whether something made a run slower than its train.py is: a busy machine, or the compiler at work meanwhile."""

import functools
import statistics
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

from harness.runtime import has_fast_bfloat16

SLOW_STEP = 1.5  # a step that took longer than this many usual ones was disturbed
BLOCKS = 8  # parts of a run, by steps, whose medians tell what is usual

# report_slow_step() warns of a lone slow step. More of them mean a busy machine: see slow_steps_percent
LONG_STEP = 10  # medians, at least
LONG_SHARE = 0.02  # of the run's seconds, at least
LONE_STEPS = 3  # slow steps in a run, at most

PROBE_SECONDS = 0.8  # of a run, between two probes of the machine's speed
PROBE_PRODUCTS = 4  # in a probe, some 3 ms: half a percent of a run


class SpeedProbe:
    """
    How fast the machine is during a run, whatever its train.py does: the time of one product of two matrices.

    A shared CPU drifts within seconds: a measurement before or after a run says little of it. On other devices nothing
    is measured: a probe would wait for the steps in their queue.
    """

    def __init__(self, device):
        self.measures = device.type == "cpu"
        self.last = 0.0
        self.milliseconds = []

        # shapes and precision of a small model; constants, because the random numbers of torch are the model's
        if self.measures:
            options = dict(dtype=torch.bfloat16 if has_fast_bfloat16(device) else torch.float32, device="cpu")
            a, b, out = (torch.ones(shape, **options) for shape in ((2048, 128), (128, 512), (2048, 512)))
            self.product = functools.partial(torch.mm, a, b, out=out)

    def look(self, elapsed):
        """Measure, if it is time to."""
        if not self.measures or elapsed < self.last + PROBE_SECONDS:
            return

        # the first one fills the caches
        self.last = elapsed
        self.product()
        self.milliseconds.append(1000 * timeit.timeit(self.product, number=PROBE_PRODUCTS) / PROBE_PRODUCTS)

    @property
    def result(self):
        """
        Milliseconds of a product: the harmonic mean over the run, since the steps follow the mean speed; None where
        nothing was measured.
        """
        if not self.milliseconds:
            return None
        return round(statistics.harmonic_mean(self.milliseconds), 4)


def slow_share(seconds, rows):
    """
    The share of the time in steps that took over SLOW_STEP times the usual seconds per training row.

    The run is cut into blocks. What is usual in block b is max(min(medians[:b + 1]), min(medians[b:])): a slowdown that
    lasts (a batch ramp, longer rows, a growing model) raises it, one that passes does not. A run that reads its rows in
    bulk is judged by seconds per step.
    """
    if not (rows > 0).all():
        rows = np.ones(len(seconds))
    pace = seconds / rows

    blocks = np.array_split(pace, max(1, min(BLOCKS, len(pace) // 5)))
    medians = np.array([np.median(block) for block in blocks])
    until = np.minimum.accumulate(medians)
    after = np.minimum.accumulate(medians[::-1])[::-1]
    usual = np.repeat(np.maximum(until, after), [len(block) for block in blocks])
    return float(seconds[pace > SLOW_STEP * usual].sum() / seconds.sum())


def report_slow_step(clock):
    """Print a line for a step that took far longer than all others."""
    seconds = np.diff([0.0, *(elapsed for elapsed, _ in clock.ticks)])
    if len(seconds) < 2 * LONE_STEPS:
        return
    usual = np.median(seconds)
    longest = seconds.argmax()
    alone = (seconds > LONG_STEP * usual).sum() <= LONE_STEPS  # more of them: something disturbs the run
    if alone and seconds[longest] > max(LONG_STEP * usual, LONG_SHARE * seconds.sum()):
        print(f"step {longest + 1} took {seconds[longest]:.1f} s, the usual {usual:.2g} s: recompiled, or a busy CPU?")


def count_graphs():
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return 0
    return dynamo.utils.counters["stats"]["unique_graphs"]


def report_recompiling(count):
    """Print how many graphs were compiled while the clock ran; of the last, its function and the guard that failed."""
    if count == 0:
        return
    events = sys.modules["torch._dynamo"].utils.get_compilation_metrics()
    last = ""
    for event in events:
        if event.co_name:  # those of a backward have none
            # "0/1: self.cap == 14.0   # def forward(self, x): ..."
            guard = (event.recompile_reason or "").partition("#")[0].partition(": ")[2].strip()
            last = f", last {event.co_name}() at {Path(event.co_filename).name}:{event.co_firstlineno}"
            # none where a function was compiled for the first time
            if guard:
                last += f" (failed guard: {guard})"
    print(f"recompiled {count} times while the clock ran{last}: pass what changes as a tensor")
