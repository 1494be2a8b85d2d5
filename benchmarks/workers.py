"""Units of work given to processes that share the machine's GPUs; rows are kept by this process alone.

One small training leaves a GPU idle most of the time, so several run on each. A unit that fails has its reason for a
row; where a worker dies, new ones go on.

    Crew(rows, given.workers, (open_bench, (given, sizes)), work, estimate_s).run(waiting, ready)
"""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from measuring import Row, Rows


def take_device(turns: Any, workers: int) -> None:
    """Begin as a worker: take a share of the cores, and the machine's GPUs by turns."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if torch.cuda.is_available():
        with turns.get_lock():
            turn, turns.value = turns.value, turns.value + 1
        torch.cuda.set_device(turn % torch.cuda.device_count())


def begin(turns: Any, workers: int, opener: Callable[..., None], given: tuple[Any, ...]) -> None:
    """Open what a worker keeps, on its device."""
    take_device(turns, workers)
    opener(*given)


@dataclass
class Crew:
    """Processes that do units."""

    rows: Rows
    workers: int
    opener: tuple[Callable[..., None], tuple[Any, ...]]
    """What each calls first, and with what."""
    work: Callable[[Row], tuple[Row, float]]
    """Returns a unit's row and its seconds."""
    estimate_s: Callable[[Row], float]
    """A unit's seconds as they are thought of beforehand."""
    needed: Callable[[Row], bool] = lambda unit: False
    """Whether others need a unit, so that it is tried again where another may have ended its worker."""
    ratios: list[float] = field(default_factory=list)
    """Seconds over their estimate, of units that are done."""

    def run(
        self, waiting: Callable[[], Iterator[Row]], ready: Callable[[Row, list[Row]], bool] = lambda unit, running: True
    ) -> None:
        """Do the units that `waiting` yields, those that are `ready`, until none is left or time is over."""
        done = -1
        while self._run(waiting, ready):
            if len(self.ratios) == done:
                raise SystemExit("workers die before they have done anything - look above")
            done = len(self.ratios)
            print("a worker died: new ones go on", flush=True)

    def _run(self, waiting: Callable[[], Iterator[Row]], ready: Callable[[Row, list[Row]], bool]) -> bool:
        """Return whether a worker died; what ran then is lost, and the rows of its units say so."""
        running: dict[Future, Row] = {}
        context, died = get_context("spawn"), False
        how = (context.Value("i", 0), self.workers, *self.opener)
        with ProcessPoolExecutor(self.workers, context, begin, how) as pool:
            while not died:
                for unit in waiting():
                    if len(running) == self.workers:
                        break
                    if unit in running.values() or not ready(unit, list(running.values())):
                        continue
                    if self._is_over(unit):
                        if unit not in self.rows.missing:
                            self.rows.miss(unit)
                    else:
                        running[pool.submit(self.work, unit)] = unit
                if not running:
                    return False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    died |= self._keep(running.pop(future), future)
            for future, unit in running.items():
                self._keep(unit, future)
        return died

    def _is_over(self, unit: Row) -> bool:
        """Tell whether a unit would end too late, from how long those before it took."""
        expected = self.estimate_s(unit) * (statistics.median(self.ratios) if self.ratios else 1.0)
        return time.monotonic() - self.rows.began + expected > 60 * self.rows.minutes

    def _keep(self, unit: Row, future: Future) -> bool:
        """Keep what a unit found, or why it failed; return whether its worker died."""
        if error := future.exception():
            traceback.print_exception(error)
            died = isinstance(error, BrokenProcessPool)
            if not (died and self.needed(unit)):
                found = {"failed": f"{type(error).__name__}: {error}"[:300], "workers": self.workers}
                self.rows.add(unit, found, 0.0)
            return died
        found, took_s = future.result()
        self.ratios.append(took_s / self.estimate_s(unit))
        self.rows.add(unit, found | {"workers": self.workers, "took_s": took_s}, took_s)
        return False
