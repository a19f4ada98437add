"""The models of a run: the base, the student with its adapters, the teacher or its server."""

from collections.abc import Callable, Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.data import ProblemSet
from paint_engine.distributed import World, raise_together, together
from paint_engine.estimate import check_run_fits
from paint_engine.model import (
    FixedTeacher,
    add_lora,
    compute_dtype,
    hub_commit,
    lm_head_weight,
    load_base,
    vocabulary_size,
)
from paint_engine.model.attention import choose_attention
from paint_engine.model.sharding import checkpoint_activations, is_sharded, shard_model
from paint_engine.model.teachers.external import OpenedTeacher
from paint_engine.recipes import keeps_base, recipe_of
from paint_engine.scoring import Asked, ServedModel, TeacherServer
from paint_engine.seeds import adapter_seed
from paint_engine.training.parts.checks import check_tokenizer


def load_checked_base(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    teachers: Sequence[OpenedTeacher],
    say: Callable[[str], object],
) -> tuple[PreTrainedModel, str]:
    """Returns the base, which the tokenizer fits, and the attention over its packed sequences. A
    collective call. If the weights will be sharded, the main rank alone has them."""
    ranks, trains_base = world if is_sharded(config, world) else None, not config.lora.enabled
    base = load_base(config.model, world.device, trains_base=trains_base, ranks=ranks, say=say)
    for note in check_tokenizer(config, tokenizer, base, teachers):
        say(f"note: {note}")
    name, dtype = config.model.attention, compute_dtype(base)
    # What takes weights to find out, only the main rank may see.
    return base, together(lambda: choose_attention(base, name, world.device, dtype), (ValueError,))


def build_student(
    config: Config,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: ProblemSet,
    world: World,
    teachers: Sequence[OpenedTeacher],
) -> tuple[nn.Module, FixedTeacher]:
    """Builds the student with its adapters, on its device or sharded, and the fixed teacher.

    teachers: those that are other models, for the estimate of memory.
    """
    device = world.device
    model = add_lora(base, config.lora, adapter_seed(config.train.seed))
    if isinstance(model, PeftModel):
        # Stands in every checkpoint's adapter configuration, beside the base's name.
        model.peft_config["default"].revision = hub_commit(config.model)
    # Sharding hides the layers that the estimate counts, so the check comes first.
    check_run_fits(
        *(config, tokenizer, train_set, model),
        device=device,
        num_ranks=world.size,
        teachers=[(teacher.shape, teacher.reader) for teacher in teachers],
    )
    teacher = FixedTeacher(model, copies=keeps_base(config))
    if config.parallel.activation_checkpointing:
        checkpoint_activations(model)
    if is_sharded(config, world):
        for module in filter(None, (model, teacher.copy)):
            shard_model(module, world, replicas=config.parallel.replicas)
    return model, teacher


def build_server(
    config: Config, served: ServedModel, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> TeacherServer:
    """Returns the teacher's server, tried on a token. A collective call; raises ValueError on every
    rank."""
    top_k = recipe_of(config).served_top_k
    assert top_k is not None
    asked = Asked(top_k, vocabulary_size(tokenizer), lm_head_weight(model).shape[0])
    server = TeacherServer(config.teacher, served, asked)
    raise_together(server.unfit())
    return server
