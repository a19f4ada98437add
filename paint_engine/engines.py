"""What samples a run's rollouts and answers its evaluations: the choice between the engines."""

from torch import nn

from paint_engine.config import Config
from paint_engine.distributed import World
from paint_engine.model import resolve_model
from paint_engine.rollout import BuiltinEngine, RolloutEngine, uses_vllm
from paint_engine.rollout_server import ServerEngine
from paint_engine.rollout_vllm import VllmEngine
from paint_engine.teacher import FixedTeacher, Teacher


def check_engine_has_teacher(config: Config) -> None:
    """Raises ValueError where the teacher is to write a rationale, and what samples lacks its
    weights."""
    teacher = config.teacher
    if teacher.reason_first and teacher.weights == "ema" and uses_vllm(config.rollout):
        raise ValueError(
            "teacher.reason_first: got true with teacher.weights 'ema' and vLLM, which has the "
            "student's and the base's weights only; use --rollout.engine builtin, or "
            "--teacher.weights fixed or live"
        )


def make_engines(
    config: Config,
    model: nn.Module,
    base: FixedTeacher,
    teacher: Teacher,
    world: World,
    max_model_len: int,
) -> tuple[RolloutEngine, RolloutEngine]:
    """What samples the rollouts, and what samples in evaluations: vLLM does both."""
    section, name = config.rollout, resolve_model(config.model.name_or_path)
    if not (config.samples and uses_vllm(section)):
        return (
            BuiltinEngine(model, teacher.scoring, section.max_sequences),
            BuiltinEngine(model, base.scoring, config.eval.max_sequences),
        )
    if section.url is not None:
        engine = ServerEngine(
            section.url,
            model,
            name,
            world,
            max_sequences=section.max_sequences,
            adapter_dir=section.adapter_dir,
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
            own_process=section.ahead == 1,
        )
    return engine, engine
