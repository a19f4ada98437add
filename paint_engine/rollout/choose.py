"""Chooses the engines that sample a run's rollouts and evaluation answers."""

import importlib.util
from collections.abc import Callable
from typing import Literal

from torch import nn

from paint_engine.config.schema import Config
from paint_engine.config.sections import RolloutSection, TeacherSection
from paint_engine.distributed import World
from paint_engine.keys import SERVER_KEY, read_key
from paint_engine.model import FixedTeacher, Teacher, is_on_hub, resolve_model
from paint_engine.recipes import draws
from paint_engine.rollout.builtin import BuiltinEngine
from paint_engine.rollout.engine import RolloutEngine
from paint_engine.rollout.http import is_sent_openly
from paint_engine.rollout.vllm_engine import VllmEngine
from paint_engine.rollout.vllm_server import ServerEngine


def check_engine_has_teacher(config: Config) -> None:
    """Raises ValueError if the teacher should write rationales and the engine lacks its weights."""
    teacher = config.teacher
    if teacher.reason_first and teacher.weights == "ema" and uses_vllm(config.rollout):
        raise ValueError(
            "teacher.reason_first: got true with teacher.weights 'ema' and vLLM, which has only "
            "the student's and the base's weights; use --rollout.engine builtin, or "
            "--teacher.weights fixed or live"
        )
    every = teacher.refresh_every
    if teacher.reason_first and every is not None and uses_vllm(config.rollout):
        raise ValueError(
            f"teacher.reason_first: got true with teacher.refresh_every {every} and vLLM, which "
            "has only the student's and the base's weights; use --rollout.engine builtin, or "
            "--teacher.refresh_every none"
        )


def engine_name(config: Config) -> Literal["builtin", "vllm", "server"]:
    """Returns what samples the run's rollouts and answers. Raises ValueError as `uses_vllm`
    does."""
    if not (draws(config) and uses_vllm(config.rollout)):
        return "builtin"
    return "vllm" if config.rollout.url is None else "server"


def evaluates_alone(config: Config) -> bool:
    """Returns whether evaluations have a vLLM engine of their own."""
    section = config.eval
    own = section.enabled and section.gpu_memory_utilization is not None
    return own and engine_name(config) == "vllm"


def open_eval_engine(
    config: Config, model: nn.Module, world: World, max_model_len: int
) -> VllmEngine:
    """Starts the engine of the evaluations' own, in a process of its own. A collective call.

    max_model_len: the longest prompt and answer together, in tokens.

    Raises ValueError on every rank if it does not start.
    """
    section, rollout = config.eval, config.rollout
    assert section.gpu_memory_utilization is not None
    return VllmEngine(
        model,
        resolve_model(config.model),
        world,
        max_model_len=max_model_len,
        max_sequences=section.max_concurrent or rollout.max_sequences,
        gpu_memory_utilization=section.gpu_memory_utilization,
        adapter_dir=rollout.adapter_dir,
        trust_remote_code=config.model.trust_remote_code,
        own_process=True,
        memory_keys="--eval.gpu_memory_utilization or --eval.max_concurrent",
    )


def make_engines(
    config: Config,
    model: nn.Module,
    base: FixedTeacher,
    teacher: Teacher,
    world: World,
    max_model_len: int,
    warn: Callable[[str], None],
) -> tuple[RolloutEngine, RolloutEngine]:
    """Builds the engine for rollouts and the engine for evaluations. vLLM is one engine for
    both; where evaluations have their own (`evaluates_alone`), that of rollouts is in a process,
    which can end meanwhile.

    warn: gets a message on each server that is lost or returns.
    """
    section, name = config.rollout, resolve_model(config.model)
    if engine_name(config) == "builtin":
        return (
            BuiltinEngine(model, teacher.scoring, section.max_sequences),
            BuiltinEngine(model, base.scoring, config.eval.max_sequences),
        )
    if section.url is not None:
        engine = ServerEngine(
            section.url,
            model,
            # A server says which id it serves, and not from where.
            config.model.name_or_path if is_on_hub(config.model) else name,
            world,
            max_sequences=section.max_sequences,
            adapter_dir=section.adapter_dir,
            warn=warn,
        )
    else:
        engine = VllmEngine(
            model,
            name,
            world,
            max_model_len=max_model_len,
            max_sequences=section.max_sequences,
            gpu_memory_utilization=section.gpu_memory_utilization,
            tensor_parallel_size=section.tensor_parallel_size,
            adapter_dir=section.adapter_dir,
            trust_remote_code=config.model.trust_remote_code,
            own_process=section.ahead == 1 or evaluates_alone(config),
        )
    return engine, engine


def server_notes(rollout: RolloutSection, teacher: TeacherSection | None = None) -> list[str]:
    """Returns a note on each server to which the key would go over a network unencrypted. Raises
    ValueError for a key that HTTP cannot send."""
    of_teacher = () if teacher is None or teacher.url is None else (teacher.url,)
    urls = dict.fromkeys((*(rollout.url or ()), *of_teacher))
    if not urls or read_key() is None:
        return []
    return [
        f"{SERVER_KEY} goes unencrypted to {url}, and so do prompts and completions; use a "
        "network that only the run's machines share, or https"
        for url in urls
        if is_sent_openly(url)
    ]


def vllm_is_installed() -> bool:
    """Returns whether `import vllm` would find a package."""
    return importlib.util.find_spec("vllm") is not None


def uses_vllm(section: RolloutSection) -> bool:
    """Returns whether the run uses vLLM: because the configuration names it, or because the choice
    is "auto" and vLLM is installed or a server is named.

    Raises ValueError if vLLM is named without a server and is not installed.
    """
    if section.engine == "vllm" and section.url is None and not vllm_is_installed():
        raise ValueError(
            "rollout.engine is 'vllm', but vLLM is not installed; install it (pip install "
            "'.[engine,vllm]' in the clone), name a server with --rollout.url, or use "
            "--rollout.engine builtin"
        )
    if section.engine == "auto":
        return section.url is not None or vllm_is_installed()
    return section.engine == "vllm"
