"""Steps of 1, 2 and 4 processes on this CPU, beside their prediction.

Groups of processes wait for their turn, so that a slow spell of the machine hits all of them. In
every round, single processes take steps of three numbers of rollouts, from which the machine is
calibrated: as many at once as the group has, each with a run of its own, since processes that share
cores and caches take more processor seconds for the same work. Then every group takes a step, and
the groups of several run bare collectives.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from bench.cluster.calibration import Calibration, with_links, workload_of
from bench.cluster.step import step_time
from bench.cluster.workload import Layout, Workload, waiting_s
from bench.measure import ROOT, progress
from paint_engine.config.command_line import load_config
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model import meta_model
from paint_engine.model.attention import pick_attention

NUM_PROCESSES = (1, 2, 4)
SHARDS = ("full", "replicate")
"""each takes 0.6 GB per process of 2 and of 4"""
STARTS_S = 300
"""until a group has built its runs, on a busy machine"""
ARGUMENTS = (
    *("--preset", "tiny", "--eval.enabled", "false", "--train.device", "cpu"),
    # Every step is the first one again: the weights do not move.
    *("--optim.learning_rate", "1e-12", "--checkpoint.every", "0"),
)


@dataclass(frozen=True)
class Group:
    """Processes that answer questions, and the stream to their first rank."""

    connection: socket.socket
    stream: IO[str]
    log: Path

    def ask(self, question: str) -> Any:
        """Returns what `bench.cluster.worker.Worker` answers. Raises RuntimeError if it ended."""
        self.send(question)
        return self.answer(question)

    def send(self, question: str) -> None:
        self.stream.write(question + "\n")
        self.stream.flush()

    def answer(self, question: str) -> Any:
        """Returns the answer to a question that was sent."""
        answer = self.stream.readline()
        if not answer:
            raise RuntimeError(f"a measured process ended at {question!r}:\n{self.log.read_text()}")
        return json.loads(answer)

    def end(self) -> None:
        """Asks nothing more: the processes end, of several groups at once."""
        self.connection.shutdown(socket.SHUT_RDWR)


def accepted(server: socket.socket, process: subprocess.Popen[bytes], log: Path) -> socket.socket:
    """Returns the connection of a group that has started. Raises RuntimeError if it ended, or has
    not started after STARTS_S."""
    server.settimeout(1.0)
    for _ in range(STARTS_S):
        try:
            return server.accept()[0]
        except TimeoutError:
            if process.poll() is not None:
                break
    raise RuntimeError(
        f"a measured group ended, or did not start within {STARTS_S} s:\n{log.read_text()}"
    )


@contextmanager
def group_of(number: int, arguments: Sequence[str], folder: Path) -> Iterator[Group]:
    """Starts a group of processes, which ends with the context."""
    folder.mkdir()
    log, path = folder / "log.txt", str(folder / "socket")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), "-m", "bench.cluster.worker", path, str(folder)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with socket.socket(socket.AF_UNIX) as server, log.open("wb") as output:
        server.bind(path)
        server.listen(1)
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=output, stderr=output, cwd=ROOT
        )
        try:
            connection = accepted(server, process, log)
            with connection, connection.makefile("rw") as stream:
                yield Group(connection, stream, log)
            # The closed stream ends the processes.
            process.wait(STARTS_S)
        finally:
            process.terminate()
            process.wait()


def padded_workload() -> Workload:
    """Returns the step of the measured runs, without rollouts yet."""
    config = load_config(ARGUMENTS).config
    attention = pick_attention(config.model.attention, torch.device("cpu"), torch.float32)
    shape = shape_of(meta_model(config))
    return Workload(config, shape, (), padded=attention == "padded", number_bytes=4)


@dataclass(frozen=True)
class Round:
    """What one round measured.

    parts: of one process, as `Worker.parts` returns them, by the number of such processes that ran
    at once. steps, bare: by sharding and number of processes, as `Worker.step` and
    `Worker.collectives` return them.
    """

    parts: Mapping[int, Sequence[Mapping[str, Any]]]
    steps: Mapping[tuple[str, int], Mapping[str, Any]]
    bare: Mapping[tuple[str, int], Mapping[str, float]]


def predictions(
    found: Round, work: Workload, cores: int, exchanges: Mapping[tuple[str, int], int]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns the predicted steps of a round by sharding and number of processes: seconds, and
    seconds by part."""
    at_once, predicted = work.config.rollout.max_sequences, {}
    for shard, number in found.steps:
        parts = found.parts[number]
        works = [workload_of(work, step["rollouts"]) for step in parts]
        own = Calibration(works, parts).machine(cores)
        if number > 1:
            bare, many = found.bare[shard, number], exchanges[shard, number]
            own = with_links(own, work, bare, number, many, parts[0]["pass_s"])
        layout = Layout(number, number if shard == "full" else 1)
        time = step_time(own, works[0], layout, at_once)
        predicted[shard, number] = {"step_s": time.step_s, "parts_s": dict(time.parts)}
    return predicted


def median_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Returns the median over rounds of the relative error of a prediction."""
    return statistics.median(p / m for p, m in zip(predicted, measured, strict=True)) - 1


def rows_of(
    rounds: Sequence[Round],
    predicted: Sequence[Mapping[tuple[str, int], Mapping[str, Any]]],
    cores: int,
) -> list[dict[str, Any]]:
    """Returns a row for each sharding and number of processes. Errors are medians over the rounds'
    own, because the machine's speed changes from round to round.

    Fields: measured_s by the clock; busy_s, what the processor seconds of all ranks take on the
    cores, without any waiting; others, the processors that other processes used.
    """
    rows = []
    for key in rounds[0].steps:
        steps, times = [one.steps[key] for one in rounds], [one[key] for one in predicted]
        measured = [step["seconds"] for step in steps]
        busy = [waiting_s(step["processor_s"], cores) for step in steps]
        predicted_s = [time["step_s"] for time in times]
        parts = {
            part: statistics.median(time["parts_s"][part] for time in times)
            for part in times[0]["parts_s"]
        }
        rows.append(
            {
                "shard": key[0],
                "num_processes": key[1],
                "measured_s": statistics.median(measured),
                "fastest_s": min(measured),
                "slowest_s": max(measured),
                "busy_s": statistics.median(busy),
                "others": statistics.median(step["others"] for step in steps),
                "predicted_s": statistics.median(predicted_s),
                "parts_s": parts,
                "error": median_error(predicted_s, measured),
                "error_to_busy": median_error(predicted_s, busy),
            }
        )
    return rows


def parts_at_once(singles: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the parts of a single process's steps while all of these take theirs, as means over
    the processes."""
    for group in singles:
        group.send("parts")
    answers = [group.answer("parts") for group in singles]
    means = []
    for steps in zip(*answers, strict=True):
        mean = dict(steps[0])
        for name in ("step_s", "pass_s"):
            mean[name] = statistics.mean(step[name] for step in steps)
        mean["parts_s"] = {
            part: statistics.mean(step["parts_s"][part] for step in steps)
            for part in steps[0]["parts_s"]
        }
        means.append(mean)
    return means


def measured_rounds(
    rounds: int, folder: Path, arguments: Sequence[str], shards: Sequence[str]
) -> tuple[list[Round], dict[tuple[str, int], int]]:
    """Measures the rounds, after one that warms up. Returns them, and the number of a step's
    exchanges of objects by sharding and number of processes."""
    found: list[Round] = []
    with ExitStack() as stack:
        groups: dict[tuple[str, int], Group] = {}

        def open_group(number: int, shard: str, name: str) -> Group:
            progress(f"starting {number} processes, {shard}")
            own = [*arguments, "--parallel.shard", shard]
            return stack.enter_context(group_of(number, own, folder / name))

        for number in NUM_PROCESSES:
            for shard in shards if number > 1 else shards[:1]:
                groups[shard, number] = open_group(number, shard, f"{shard}-{number}")
        singles = [groups[shards[0], 1]]
        for place in range(1, max(NUM_PROCESSES)):
            singles.append(open_group(1, shards[0], f"single-{place}"))
        several = {key: group for key, group in groups.items() if key[1] > 1}
        exchanges = {key: group.ask("exchanges")["number"] for key, group in several.items()}
        for number in range(rounds + 1):
            parts = {many: parts_at_once(singles[:many]) for many in NUM_PROCESSES}
            steps = {key: group.ask("step") for key, group in groups.items()}
            bare = {key: group.ask("collectives") for key, group in several.items()}
            if number > 0:
                found.append(Round(parts, steps, bare))
            seconds = ", ".join(f"{step['seconds']:.2f}" for step in steps.values())
            progress(f"round {number} of {rounds}: steps of {seconds} s")
        for group in [*groups.values(), *singles[1:]]:
            group.end()
    return found, exchanges


def measure(
    rounds: int, shards: Sequence[str] = SHARDS[:1], arguments: Sequence[str] = ARGUMENTS
) -> dict[str, Any]:
    """Returns the measured and predicted steps: the result's part of the JSON.

    shards: values of `parallel.shard` for several processes.
    """
    cores, work = len(os.sched_getaffinity(0)), padded_workload()
    with tempfile.TemporaryDirectory() as folder:
        found, exchanges = measured_rounds(rounds, Path(folder), arguments, shards)
    predicted = [predictions(one, work, cores, exchanges) for one in found]
    tokens = {step["num_tokens"] for one in found for step in one.steps.values()}
    return {
        "cores": cores,
        "rounds": rounds,
        "num_rollouts": work.config.train.batch_size,
        "num_tokens": sorted(tokens),
        "rows": rows_of(found, predicted, cores),
    }
