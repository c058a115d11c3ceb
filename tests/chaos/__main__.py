"""`python -m tests.chaos --kills 30 --seed 0`: kill, resume, compare; exits with 1 on a problem.

Each run is started on two ranks and killed a few times, one rank or all, at a random moment or
while a checkpoint is being written; after each kill it is resumed. In the end its adapter must be,
bit for bit, that of a run that nobody killed. Every fourth run ends on one rank instead, where it
must come to nearly the same loss. At last a rank is stopped instead of killed: the other one waits
for `--timeout` and leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import bridge.peft.finetune.run  # noqa: F401  # imported once, here, for all ranks of all runs
from bridge.peft.finetune.record import METRICS, PARTIAL, RECORD, checkpoints, incomplete
from bridge.peft.text_table import table
from tests.chaos.job import Job, forked
from tests.helpers.cli_fixtures import save_tiny_model, sums, write_rows

TIMEOUT, SHORT_TIMEOUT = 20, 5
LOST = "error: another process of the run has ended"
OPTIONS = [
    *("--dim", 4, "--dropout", 0.1, "--learning-rate", 5e-3, "--steps", 30, "--batch-size", 12),
    *("--save-every", 2, "--eval-every", 15, "--eval-share", 0.1, "--timeout", TIMEOUT),
]


@dataclass(frozen=True)
class Kill:
    """What was killed when, and what was found afterwards."""

    run: int
    layout: str
    who: str
    aim: str
    seconds: float
    kept: str
    torn: bool
    survivor: str
    problem: str


class Chaos:
    """The kills of one call."""

    def __init__(
        self, directory: Path, *, kills: int, seed: int, layouts: list[str], ranks: int
    ) -> None:
        self.directory, self.kills_wanted, self.layouts = directory, kills, layouts
        self.ranks = ranks
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.same_bits = self.on_one_rank = 0
        self.model, self.data = directory / "model", directory / "data.jsonl"
        self.references: dict[str, tuple[bytes, float, float]] = {}

    def run(self) -> int:
        """Make all kills and print what came of them."""
        os.waitpid(forked(self._save_inputs, self.directory / "inputs.log"), 0)
        number = 0
        while len(self.kills) < self.kills_wanted:
            number += 1
            self._one_run(number, self.layouts[number % len(self.layouts)])
        hung = self._hung(self.layouts[0])
        self._report(number, hung)
        return 1 if self.problems else 0

    def _save_inputs(self) -> int:
        save_tiny_model(self.model)
        write_rows(self.data, sums(66))
        return 0

    def _arguments(self, output: Path, layout: str) -> list[object]:
        """How a user goes on: resume where there is a checkpoint, else start again."""
        if (output / RECORD).exists() and checkpoints(output):
            return ["--resume", "--output", output]
        files = ["--model", self.model, "--data", self.data, "--output", output]
        again = ["--overwrite"] if output.exists() else []
        return [*files, *OPTIONS, "--parallel", layout, *again]

    def _reference(self, layout: str) -> tuple[bytes, float, float]:
        """The adapter of a run that nobody kills, its loss, and its seconds."""
        if layout not in self.references:
            output = self.directory / f"reference-{layout}"
            job = Job(self._arguments(output, layout), self.directory, ranks=self.ranks)
            seconds = job.wait(120)
            if seconds is None or any(job.codes):
                sys.exit(f"the run that nobody kills failed: {job.codes}\n{job.said()}")
            self.references[layout] = (*_result(output), seconds)
        return self.references[layout]

    def _one_run(self, number: int, layout: str) -> None:
        reference, loss, seconds = self._reference(layout)
        output = self.directory / f"run-{number}"
        for _ in range(self.random.randint(2, 4)):
            if len(self.kills) < self.kills_wanted and not self._killed(
                number, layout, output, seconds
            ):
                break
        ranks = 1 if number % 4 == 0 else self.ranks
        if not (output / METRICS).exists():
            job = Job(self._arguments(output, layout), self.directory, ranks=ranks)
            job.wait(120)
            if any(job.codes):
                self.problems.append(f"run {number} cannot go on: {job.codes}\n{job.said()}")
                return
        adapter, its_loss = _result(output)
        if ranks == 1:
            self.on_one_rank += 1
            if abs(its_loss / loss - 1) > 0.05:
                self.problems.append(f"run {number}, ended on one rank: {its_loss}, not {loss}")
        elif adapter == reference:
            self.same_bits += 1
        else:
            self.problems.append(f"run {number} ({layout}) ended with other bits")

    def _killed(self, number: int, layout: str, output: Path, seconds: float) -> bool:
        """Start or resume, kill, look; False if the run was finished before the kill."""
        arguments = self._arguments(output, layout)
        before = _unpublished(output)
        job = Job(arguments, self.directory, ranks=self.ranks)
        begun = time.monotonic()
        aim = self.random.choice(["moment", "checkpoint"])
        everybody = list(range(self.ranks))
        wanted = self.random.choice([*([rank] for rank in everybody), everybody])
        self._await(job, aim, output, seconds)
        if not job.running():
            return False
        job.signal(wanted)
        at = time.monotonic() - begun
        # a rank that cannot reach the first one at the start tries up to three times as long
        waited = job.wait(3 * TIMEOUT + 10)
        kept = checkpoints(output)
        self.kills.append(
            Kill(
                run=number,
                layout=layout,
                who="all" if wanted == everybody else f"rank {wanted[0]}",
                aim=aim,
                seconds=at,
                kept=kept[-1].name if kept else "none",
                torn=_unpublished(output) not in (before, {}),
                survivor="-" if wanted == everybody else _seconds(waited),
                problem=self._problem(job, wanted, waited, output),
            )
        )
        if problem := self.kills[-1].problem:
            self.problems.append(f"kill {len(self.kills)}: {problem}\n{job.said()}")
        return True

    def _await(self, job: Job, aim: str, output: Path, seconds: float) -> None:
        """Wait for the moment to kill, or for the run's end."""
        deadline = time.monotonic() + self.random.uniform(0.05, 0.95) * seconds
        while time.monotonic() < deadline and job.running():
            time.sleep(0.001)
        if aim == "checkpoint":
            while not any(output.glob(f"{PARTIAL}/*")) and job.running():
                time.sleep(0.0002)
            time.sleep(self.random.uniform(0, 0.05))

    def _problem(self, job: Job, wanted: list[int], waited: float | None, output: Path) -> str:
        if waited is None:
            return "a survivor did not stop"
        if half := incomplete(output):
            return f"{half[0].name} is there and not complete"
        survivors = [code for rank, code in enumerate(job.codes) if rank not in wanted]
        if not any(survivors) and (output / METRICS).exists():
            return ""  # all was done
        if survivors and (set(survivors) != {2} or LOST not in job.said()):
            return f"the survivors left with {survivors} and not with a clear line"
        return ""

    def _hung(self, layout: str) -> float:
        """Stop a rank for good in the middle: how long the other one waited for it."""
        output = self.directory / "hung"
        arguments = [*self._arguments(output, layout), "--timeout", SHORT_TIMEOUT]
        job = Job(arguments, self.directory, ranks=self.ranks)
        while not checkpoints(output) and job.running():
            time.sleep(0.001)
        job.signal([1], signal.SIGSTOP)
        begun = time.monotonic()
        while job.running() and job.codes[0] is None and time.monotonic() < begun + 60:
            time.sleep(0.01)
        waited = time.monotonic() - begun
        job.signal(range(self.ranks))
        job.wait(10)
        if job.codes[0] != 2 or LOST not in job.said():
            self.problems.append(f"beside a rank that hangs: {job.codes[0]}\n{job.said()}")
        return waited

    def _report(self, runs: int, hung: float) -> None:
        header = ("kill", "run", "layout", "killed", "aim", "after", "kept", "torn", "stopped")
        rows = []
        for number, kill in enumerate(self.kills, 1):
            after, torn = f"{kill.seconds:.1f} s", "yes" if kill.torn else "no"
            first = (str(number), str(kill.run), kill.layout, kill.who, kill.aim, after)
            rows.append((*first, kill.kept, torn, kill.survivor))
        print("\n".join(table(header, rows)))
        print(*self.problems, sep="\n")
        torn = sum(kill.torn for kill in self.kills)
        print(
            f"{len(self.kills)} kills in {runs} runs, {torn} of them while a checkpoint was being "
            f"written. {self.same_bits} runs ended on {self.ranks} ranks with the bits of a run "
            f"that nobody killed, {self.on_one_rank} on one rank with its loss. A rank that hung "
            f"was given up after {_seconds(hung)} (--timeout {SHORT_TIMEOUT}). "
            f"{len(self.problems)} problems."
        )


def _result(output: Path) -> tuple[bytes, float]:
    metrics = json.loads((output / METRICS).read_text())
    return (output / "adapter_model.safetensors").read_bytes(), metrics["eval_loss_after"]


def _unpublished(output: Path) -> dict[str, int]:
    """What there is of a checkpoint that is being written, and when each was last touched."""
    try:
        found = [*(output / PARTIAL).rglob("*")]
        return {str(path): path.stat().st_mtime_ns for path in found}
    except FileNotFoundError:  # just now published
        return {}


def _seconds(waited: float | None) -> str:
    return "never" if waited is None else f"{waited:.1f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", default=["ddp", "fsdp", "tp"])
    parsed = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(Chaos(Path(scratch), **parsed).run())
