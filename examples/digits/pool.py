"""Many trainings of one student under one teacher, in several processes, with one bar and the time that is left."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import options as settings
from .__main__ import Trainer, load
from .coco import COCO_SIDES, Split
from .digits import DIGIT_SIDES
from .progress import stage
from .train import Distillation, Run, Schedule, TeacherOutputs


@dataclass(frozen=True)
class Job:
    """One training."""

    label: str
    schedule: Schedule
    seed: int
    how: Distillation | None


class Bench:
    """The data, the teacher and its outputs, ready to train students with."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.splits = load(console, options)
        self.sides = COCO_SIDES if options.data else DIGIT_SIDES
        self.trainer = Trainer(console, options, self.splits, self.sides)
        self.teacher_size, self.student_size = settings.sizes(options)
        plan = settings.teacher_schedule(options)
        self.teacher, self.teacher_run = self.trainer("teacher", "teacher", self.teacher_size, plan, seed=0)
        with stage(console, "teacher outputs", len(self.train)) as advance:
            self.outputs = TeacherOutputs(self.teacher, self.train.pictures, options.cache_gb, advance)

    @property
    def train(self) -> Split:
        return self.splits[0]

    def __call__(self, job: Job) -> tuple[Run, int]:
        """The finished training, and how many iterations were left of it."""
        begun: list[int] = []

        def advance(done: int, total: int | None = None, note: str | None = None) -> None:
            begun.append(done)

        taught = self.outputs if job.how else None
        _, run = self.trainer(
            "losses", job.label, self.student_size, job.schedule, job.seed, job.how, taught, advance=advance
        )
        return run, job.schedule.iterations - begun[0]


_bench: Bench
"""A worker process' own."""


def _start(options: argparse.Namespace) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(options, Console(quiet=True))


def _work(job: Job) -> tuple[Run, int]:
    return _bench(job)


class Pool:
    """Runs jobs, in this process or in workers of one thread each, which read what the bench has left on disk."""

    def __init__(self, bench: Bench, executor: ProcessPoolExecutor | None, progress: Progress, iterations: int) -> None:
        self.bench, self.executor, self.progress = bench, executor, progress
        self.task = progress.add_task("", total=iterations, left="", note="")
        self.started, self.done, self.trained, self.total = time.perf_counter(), 0, 0, iterations

    def __call__(self, title: str, jobs: Sequence[Job]) -> list[Run]:
        """The runs, in the jobs' order."""
        self.progress.update(self.task, description=title)
        runs: dict[int, Run] = {}
        if self.executor is None:
            for index, job in enumerate(jobs):
                runs[index] = self._finished(job, *self.bench(job))
        else:
            waiting: dict[Future[tuple[Run, int]], int] = {
                self.executor.submit(_work, job): index for index, job in enumerate(jobs)
            }
            for future in as_completed(waiting):
                index = waiting[future]
                runs[index] = self._finished(jobs[index], *future.result())
        return [runs[index] for index in range(len(jobs))]

    def _finished(self, job: Job, run: Run, trained: int) -> Run:
        self.done += job.schedule.iterations
        self.trained += trained
        left = time_left(time.perf_counter() - self.started, self.trained, self.total - self.done)
        note = f"{job.label}, seed {job.seed}: {run.metrics['AP'] or 0:.1f} AP"
        self.progress.update(self.task, completed=self.done, left=left, note=note)
        return run


def time_left(seconds: float, trained: int, iterations: int) -> str:
    """Of iterations that take as long as those that were trained, not kept, in so many seconds."""
    if not trained or not iterations:
        return ""
    minutes = round(seconds / trained * iterations / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min left"


@contextmanager
def pool(bench: Bench, workers: int, console: Console, iterations: int) -> Iterator[Pool]:
    """One worker is this process; of more, each reads the data and keeps the teacher's outputs for itself."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}"),
    )
    executor = None
    if workers > 1:
        # Not forked: a process whose threads have computed does not survive that.
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(bench.options,))
    try:
        with Progress(*columns, console=console) as progress:
            yield Pool(bench, executor, progress, iterations)
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
