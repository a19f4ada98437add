"""The trained model as one checkpoint: adapters merged into the base in float64, rounded once, and
how much of the update the rounding leaves."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from paint_engine.checkpoint.adapters.fit import PREFIX, check_adapter, quiet_peft, tensor_names
from paint_engine.config.sections import ModelSection
from paint_engine.files import ADAPTER_CONFIG_FILE
from paint_engine.model import resolve_model
from paint_engine.model.stored import check_finite, empty_model, load_weights, read_settings

# Weights that are compared at once: what fits into a processor's cache.
_PIECE = 1 << 16
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Survival:
    """How much of the update of a model's weights is left once they are rounded to a dtype.

    Survival(torch.bfloat16, num_tensors=14, num_updated=98304, num_changed=31021)

    num_tensors: the tensors with an update.
    num_updated: their weights whose exact update is not zero.
    num_changed: those of them that differ from the base's, both rounded to the dtype.
    """

    dtype: torch.dtype
    num_tensors: int = 0
    num_updated: int = 0
    num_changed: int = 0
    _squared_error: float = field(default=0.0, repr=False)
    _squared_update: float = field(default=0.0, repr=False)

    @property
    def share(self) -> float:
        """Of the updated weights, those that are not the base's again; 1 without an update."""
        return self.num_changed / self.num_updated if self.num_updated else 1.0

    @property
    def relative_error(self) -> float:
        """|| (W_rounded - W_base) - update || / || update || over all tensors; W_base rounded
        alike; 0 without an update."""
        return (self._squared_error / self._squared_update) ** 0.5 if self._squared_update else 0.0


def count_update(survivals: list[Survival], before: Tensor, exact: Tensor) -> None:
    """Adds one tensor to each of the survivals.

    before: the base's, as it is stored.
    exact: the trained one, in float32 or float64.
    """
    num_updated, squared_update = 0, 0.0
    for old, new in zip(
        before.reshape(-1).split(_PIECE), exact.reshape(-1).split(_PIECE), strict=True
    ):
        update = (new.double() - old.double()).float()
        num_updated += int(update.count_nonzero())
        squared_update += _squared_norm(update)
        for survival in survivals:
            # Exact where the two are close, which is where it matters.
            left = new.to(survival.dtype).float() - old.to(survival.dtype).float()
            # Without an update nothing is left of it.
            survival.num_changed += int(left.count_nonzero())
            survival._squared_error += _squared_norm(left - update)
    for survival in survivals:
        survival.num_tensors += num_updated > 0
        survival.num_updated += num_updated
        survival._squared_update += squared_update


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def merge_adapter(
    base: PreTrainedModel, checkpoint: Path, survivals: list[Survival]
) -> PreTrainedModel:
    """The base with the adapter's update added to its weights, in place.

    The updated weights become those of the first of `survivals`' dtype, rounded once; the others
    keep theirs. Each survival counts all updates.

    Raises ValueError for adapters that no weights of the base's architecture can hold.
    """
    dtype = survivals[0].dtype
    before = _widen(base, checkpoint)
    names = {id(module): name for name, module in base.named_modules()}
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(checkpoint))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _check_layer(layer, checkpoint)
            assert isinstance(layer, Linear | Embedding | ParamWrapper)
            home = names[id(layer.get_base_layer())]
            for name, old, exact in _merge_layer(layer, model):
                old = before.pop(f"{home}.{name}", old)
                count_update(survivals, old, exact)
                getattr(layer.get_base_layer(), name).data = exact.to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            if isinstance(module, TrainableTokensWrapper):
                _untie(module.original_module, "weight", model)
            whole = module.unload_and_optionally_merge_module(True, False, None)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], whole)
    merged = model.unload()
    assert isinstance(merged, PreTrainedModel)
    # What the file holds whole: biases, modules_to_save, rows of tokens, embeddings.
    for name, old in before.items():
        parameter = merged.get_parameter(name)
        count_update(survivals, old, parameter.data)
    _settle_head(merged)
    return merged


def _widen(base: PreTrainedModel, checkpoint: Path) -> dict[str, Tensor]:
    """Makes those weights of the base float32 that the adapter's file replaces, since peft rounds
    the new ones to the dtype of the old. Returns the old ones by the base's names."""
    names = [name.removeprefix(PREFIX) for name in tensor_names(checkpoint)]
    names = [n.replace(".base_layer.", ".").replace(_TOKENS, ".weight") for n in names]
    parameters = dict(base.named_parameters(remove_duplicate=False))
    before = {name: parameters[name].data for name in names if name in parameters}
    for name, old in before.items():
        parameters[name].data = old.to(torch.float32, copy=True)
    return before


def _check_layer(layer: LoraLayer, checkpoint: Path) -> None:
    if not isinstance(layer, Linear | Embedding | ParamWrapper):
        raise ValueError(
            f"the adapter {checkpoint} adapts a layer of the kind {type(layer).__name__}, into "
            "which it cannot be merged here; needs linear layers, embeddings or parameters of a "
            "base that is not quantised; export it with --form adapter"
        )
    if any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None:
        raise ValueError(
            f"the adapter {checkpoint} has lora_bias on layers of the base that have no bias, so "
            "the merged model would have weights that its architecture does not; export it with "
            "--form adapter"
        )


def _merge_layer(
    layer: Linear | Embedding | ParamWrapper, model: nn.Module
) -> list[tuple[str, Tensor, Tensor]]:
    """Merges one layer by peft's own rule, in float64.

    Returns each parameter's name in the base's layer, its old value, and its new one in float64.
    """
    home = layer.get_base_layer()
    assert isinstance(home, nn.Module)
    if isinstance(layer, ParamWrapper):
        parts = [layer.parameter_name]
    else:
        parts = ["weight", *(["bias"] if any(layer.lora_bias.values()) else [])]
    old = {}
    for part in parts:
        _untie(home, part, model)
        old[part] = getattr(home, part).data
        getattr(home, part).data = old[part].double()
    for name, child in layer.named_children():
        if name != "base_layer":
            child.double()
    layer.merge()
    return [(part, old[part], getattr(home, part).data) for part in parts]


def _untie(home: nn.Module, part: str, model: nn.Module) -> None:
    """Gives the module a parameter of its own, where another module has the same: an adapter on
    the embeddings changes the embeddings and not the head."""
    parameter = getattr(home, part)
    holders = [
        module
        for module in model.modules()
        if module is not home and any(p is parameter for p in module._parameters.values())
    ]
    if holders:
        setattr(home, part, nn.Parameter(parameter.data.clone(), requires_grad=False))


def _settle_head(model: PreTrainedModel) -> None:
    """Ties head and embeddings again, or marks them as two, after they were updated."""
    text = model.config.get_text_config()
    if not text.tie_word_embeddings:
        return
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear) and isinstance(embeddings, nn.Embedding)
    weights = head.get_parameter("weight"), embeddings.get_parameter("weight")
    if torch.equal(*weights):
        head.register_parameter("weight", weights[1])
        return
    for config in {id(c): c for c in (text, model.config)}.values():
        config.tie_word_embeddings = False


def load_whole(checkpoint: Path, section: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint that has all weights, in this dtype."""
    return _convert(_own_weights(checkpoint, section), dtype)


def _own_weights(checkpoint: Path, section: ModelSection) -> PreTrainedModel:
    own, path = section.model_copy(update={"name_or_path": str(checkpoint)}), str(checkpoint)
    if not section.trust_remote_code:
        return load_weights(path, own, None)
    # A checkpoint holds a copy of the base's code, which anybody may have changed since: what runs
    # is the code of the model that the command line names. All trained weights are float32.
    settings = read_settings(resolve_model(section, with_weights=False), section)
    return load_weights(path, own, torch.float32, settings=settings)


@torch.no_grad()
def build_trained(
    checkpoint: Path, section: ModelSection, survivals: list[Survival]
) -> PreTrainedModel:
    """The trained model in the dtype of the first of `survivals`: adapters merged, or the
    checkpoint's own weights. Each survival counts the update of the base's weights.

    Raises ValueError where the base cannot be loaded, or where the adapter does not fit it.
    """
    path = resolve_model(section)
    if (checkpoint / ADAPTER_CONFIG_FILE).is_file():
        check_against_base(checkpoint, section)
        model = merge_adapter(load_weights(path, section, None), checkpoint, survivals)
        # Finite adapters can have a product that is not.
        merged = f"of {checkpoint}, merged into {section.name_or_path},"
        check_finite(_convert(model, survivals[0].dtype), merged)
    else:
        model = _own_weights(checkpoint, section)
        trained = dict(model.named_parameters())
        for name, old in load_weights(path, section, None).named_parameters():
            count_update(survivals, old.data, trained[name].data)
    return _convert(model, survivals[0].dtype)


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def check_against_base(checkpoint: Path, section: ModelSection) -> None:
    """`check_adapter` with the base that the section names. Loads its configuration alone."""
    shape = empty_model(read_settings(resolve_model(section), section), section)
    check_adapter(checkpoint, shape, section.name_or_path)
