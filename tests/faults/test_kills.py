"""Killed again and again at random moments, and continued by the same command each time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest

from tests.faults.runs import EVERYTHING, Runs, check_disk, differences
from tests.faults.server import Kill


class Chains:
    """Runs that are killed in a row, each until it comes through in spite of it, as many as it takes.

    Half of the kills are at a change of a file, drawn from all that an uninterrupted run makes; half after a time,
    drawn from the time it takes. The first of a run are drawn from all of it. It has less to do then with every start,
    so the later ones are drawn from the beginning alone: else most would come too late.
    """

    def __init__(self, runs: Runs, seed: int) -> None:
        self.runs, self.draw = runs, random.Random(seed)
        self.whole, first = runs.reference(**EVERYTHING)
        self.events, self.seconds = len(first.changes), first.seconds
        self.kills: list[str] = []

    def go(self, kills: int) -> None:
        """Run after run, until there were so many kills."""
        while len(self.kills) < kills:
            self._one(kills)

    def _one(self, kills: int) -> None:
        place = self.runs.place(**EVERYTHING)
        starts = 0
        while len(self.kills) < kills:
            share = self.draw.uniform(0, 1 if starts == 0 else 0.6)
            starts += 1
            by_event = self.draw.random() < 0.5
            event = 1 + int(share * self.events) if by_event else 0
            run = self.runs.start(place, Kill(event=event))
            if not by_event:
                time.sleep(share * self.seconds)
                os.kill(run.pid, signal.SIGKILL)
            code = run.wait()
            if code == 0:
                break
            self.kills.append(f"change {event}" if by_event else f"{share * self.seconds:.2f} s")
            assert code == -signal.SIGKILL, f"{self.kills}: exit code {code}\n{run.output}"
            check_disk(place)
        output = self.runs.finish(place).output
        found = differences(place, self.whole)
        assert not found, "\n".join([f"after {starts} starts, kills so far: {self.kills}", *found, output])
        assert "already finished" in self.runs.finish(place).output


@pytest.mark.slow
def test_five_kills(runs: Runs) -> None:
    chains = Chains(runs, seed=0)
    chains.go(5)
    assert len(chains.kills) == 5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_fifty_kills(runs: Runs, seed: int) -> None:
    """Ten for each of five seeds."""
    chains = Chains(runs, seed)
    chains.go(10)
    assert len(chains.kills) == 10


@pytest.mark.slow
@pytest.mark.long
def test_a_kill_at_every_kind_of_change(runs: Runs) -> None:
    """One at the first change of a file that each line of ours makes, in the order in which they come."""
    whole, first = runs.reference(**EVERYTHING)
    kinds = {kind: number for number, kind in reversed(list(enumerate(first.changes, start=1)))}
    faults = []
    for kind, number in sorted(kinds.items(), key=lambda item: item[1]):
        place = runs.place(**EVERYTHING)
        assert runs.start(place, Kill(event=number)).wait() == -signal.SIGKILL
        try:
            check_disk(place)
            runs.finish(place)
            assert not (found := differences(place, whole)), found
        except Exception as error:
            faults.append(f"change {number}, {kind}: {str(error)[-500:]}")
        shutil.rmtree(place.folder)
    assert not faults, f"{len(faults)} of {len(kinds)}:\n" + "\n".join(faults)
