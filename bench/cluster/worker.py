"""One process of a group that `bench.cluster.measured` starts with torchrun: `python -m
bench.cluster.worker SOCKET FOLDER ARGUMENT...`.

It builds the run of these arguments, connects to the socket, and answers questions until there are
no more. Every rank does what a question asks; rank 0 reads it and answers.
"""

import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from bench.step.cases import teacher_prompt_ids
from paint_engine.config.command_line import load_config
from paint_engine.distributed import barrier, gather_objects, init_world, my_share
from paint_engine.model.sharding import decoder_layers, unsharded
from paint_engine.training import step as training_step
from paint_engine.training.build import build_run
from paint_engine.training.run import Run
from paint_engine.types import TrainExample
from paint_kernels._spinning import used_seconds

REPEATS = 5
"""of each bare collective; the median counts"""
SMALL_BYTES, LARGE_BYTES = 1 << 10, 1 << 22


class Worker:
    """The run of this process, and its steps on the first batch.

    A single process also has runs with a half and a quarter of the rollouts, to calibrate.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.world = init_world(torch.device("cpu"))
        self.examples: list[TrainExample] = []
        sizes = [load_config(arguments).config.train.batch_size]
        if self.world.size == 1:
            sizes += [sizes[0] // 2, sizes[0] // 4]
        self.runs = {size: self._open(arguments, size, folder) for size in sizes}
        self.run = self.runs[sizes[0]]

    def _open(self, arguments: Sequence[str], size: int, folder: Path) -> Run:
        directory = folder / f"run-{self.world.size}-{size}"
        settings = ["--train.batch_size", str(size), "--run.dir", str(directory)]
        return build_run(load_config([*arguments, *settings]), self.world)

    def _step(self, run: Run) -> None:
        """Takes the first step again, so that every step has the same rollouts."""
        sample = training_step.sample_step

        def keep(*given: Any) -> Any:
            examples, lag = sample(*given)
            self.examples = list(examples)
            return examples, lag

        with mock.patch.object(training_step, "sample_step", keep):
            training_step.train_step(run, 0)

    def step(self) -> dict[str, Any]:
        """Takes a step. Returns its seconds, the processor seconds of every rank, and how many
        processors other processes used meanwhile."""
        self.run.timings.seconds.clear()
        barrier()
        begin, own, every = time.perf_counter(), time.process_time(), used_seconds()
        self._step(self.run)
        seconds, own = time.perf_counter() - begin, time.process_time() - own
        every = used_seconds() - every
        ranks = gather_objects((seconds, own))
        processor_s = [used for _, used in ranks]
        return {
            "seconds": max(seconds for seconds, _ in ranks),
            "processor_s": processor_s,
            "others": (every - sum(processor_s)) / seconds,
            "parts_s": dict(self.run.timings.seconds),
            "num_tokens": sum(len(e.rollout.completion_ids) for e in self.examples),
        }

    def parts(self) -> list[dict[str, Any]]:
        """Takes a step of each number of rollouts. Returns their processor seconds by part,
        their rollouts' lengths (student's prompt, teacher's prompt, completion), and what
        `_pass_s` returns."""
        found = []
        for run in self.runs.values():
            run.timings.clock = time.process_time
            run.timings.seconds.clear()
            begin = time.process_time()
            self._step(run)
            seconds = time.process_time() - begin
            run.timings.clock = time.perf_counter
            lengths = [
                (
                    len(e.rollout.prompt_ids),
                    len(teacher_prompt_ids(e)),
                    len(e.rollout.completion_ids),
                )
                for e in self.examples
            ]
            found.append(
                {"parts_s": dict(run.timings.seconds), "step_s": seconds, "rollouts": lengths}
            )
        return [{**one, "pass_s": self._pass_s()} for one in found]

    def exchanges(self) -> dict[str, int]:
        """Takes a step. Returns the number of exchanges of objects in it."""
        gather = dist.all_gather_object
        with mock.patch.object(dist, "all_gather_object", side_effect=gather) as counted:
            self._step(self.run)
        return {"number": counted.call_count}

    def collectives(self) -> dict[str, float]:
        """Returns the seconds of bare collectives: one after another, nothing beside them."""
        size, model = self.world.size, self.run.model
        found = {
            "object_s": self._median(lambda: gather_objects({"loss": 0.0})),
            "rollouts_s": self._median(lambda: gather_objects(my_share(self.examples, self.world))),
        }
        for name, number in (("small", SMALL_BYTES), ("large", LARGE_BYTES)):
            whole = torch.zeros(number // 4)
            part = torch.zeros(number // 4 // size)
            found[f"gather_{name}_s"] = self._median(
                lambda part=part, whole=whole: dist.all_gather_into_tensor(whole, part)
            )
            found[f"sum_{name}_s"] = self._median(lambda whole=whole: dist.all_reduce(whole))
        if self.run.is_sharded:
            found["weights_s"] = self._median(lambda: self._gather_weights(model))
            layer: Any = decoder_layers(model)[0]
            found["layer_s"] = self._median(lambda: (layer.unshard(), layer.reshard()))
        found["pass_s"] = max(gather_objects(self._pass_s()))
        return found

    @torch.no_grad()
    def _pass_s(self) -> float:
        """Returns the processor seconds of a pass of one token, with whole weights: those of a
        sharded model have FSDP's hooks besides."""
        token = torch.zeros(1, 1, dtype=torch.long)
        with unsharded(self.run.model) if self.run.is_sharded else nullcontext():
            for _ in range(REPEATS):
                self.run.model(token)
            begin = time.process_time()
            for _ in range(REPEATS):
                self.run.model(token)
            return (time.process_time() - begin) / REPEATS

    @staticmethod
    def _gather_weights(model: torch.nn.Module) -> None:
        with unsharded(model):
            pass

    @staticmethod
    def _median(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(REPEATS):
            barrier()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return max(gather_objects(statistics.median(seconds)))

    def serve(self, path: str) -> None:
        """Answers questions until the other side closes the socket."""
        with socket.socket(socket.AF_UNIX) as client:
            stream = None
            if self.world.is_main:
                client.connect(path)
                stream = client.makefile("rw")
            while question := gather_objects(stream and stream.readline())[0]:
                answer = getattr(self, question.strip())()
                if stream is not None:
                    stream.write(json.dumps(answer) + "\n")
                    stream.flush()


def main(path: str, folder: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    Worker(arguments, Path(folder)).serve(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
