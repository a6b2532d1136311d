"""Processes that take part in process groups of torch.distributed, started once for many tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds within which each job has to end, beside other work on few cores."""


def _work(pipe, rank: int) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, arguments, world, store, timeout = job
        try:
            distributed.init_process_group(
                "gloo",
                store=distributed.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            try:
                # A rank that has nothing to exchange would leave before a slow one has connected.
                distributed.barrier()
                result = True, function(*arguments)
            finally:
                distributed.destroy_process_group()
        except BaseException:
            result = False, traceback.format_exc()
        pipe.send(result)


class Pool:
    """Up to ``size`` processes. :meth:`run` makes a new process group of the first few."""

    def __init__(self, size: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # A clean process imports torch once, and the others are its forks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "adamezo.distributed"])
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 30.0
    ) -> list[Any]:
        """What a function of a module returns on each of ``world`` ranks.

        Raises:
            RuntimeError: it raised on one; the message has the traceback.
        """
        self._jobs += 1
        store = str(Path(self._folder.name) / f"store{self._jobs}")
        for pipe in self._pipes[:world]:
            pipe.send((function, arguments, world, store, timeout))
        results = []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(TIMEOUT):
                raise RuntimeError(f"rank {rank} of {world} has not come back")
            results.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(results) if not fine]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [value for _, value in results]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                pipe.send(None)
            except OSError:
                pass
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
