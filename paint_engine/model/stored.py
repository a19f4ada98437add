"""Reads a model from its safetensors files, and refuses files that do not fit the model.

transformers initialises a weight at random where the files lack it, ignores a tensor that fits
nowhere, and casts integers to floating point. Here all of these are refused.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from paint_engine.config.bundled import BUNDLED
from paint_engine.config.sections import ModelSection
from paint_engine.files import BadFile, Record, check_no_devices, checked, read_json

# What saving a wrapped model writes before all names (PEFT, DistributedDataParallel) or before the
# names of a wrapped submodule (torch.compile, FSDP, activation checkpointing).
_WRAPPERS = re.compile(
    r"^(?:base_model\.model|module)\."
    r"|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# In the words of safetensors. Weights of any other dtype are quantised.
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NUM_NAMED = 3


def load_failure(what: str, name: str, error: Exception) -> ValueError:
    """Returns the error for a part of a model that cannot be read, with what to do."""
    near = difflib.get_close_matches(name, BUNDLED, n=1)
    remedy = (
        "a file in that directory is damaged or not of this model; save or fetch it again"
        if name in BUNDLED or Path(name).is_dir()
        else "it is neither a local directory nor reachable on the hub; check "
        "--model.name_or_path (--model in an evaluation or export) and the network, or name a "
        "local directory" + (f"; did you mean {near[0]}?" if near else "")
    )
    # A library's message may have several lines.
    reason = " ".join(str(error).split())
    return ValueError(
        f"{what} {name!r} could not be loaded ({type(error).__name__}: {reason}): {remedy}"
    )


def read_settings(path: str, section: ModelSection) -> PreTrainedConfig:
    """Reads a model's config.json.

    path: what `resolve_model` returns for the section.

    Raises ValueError if it cannot be read, if it says that the weights are quantised, and if it
    names code of the hub that is not trusted.
    """
    name = section.name_or_path
    if Path(path).is_dir():
        check_no_devices(Path(path))
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        # Each configuration class checks its values in its own way, with errors of its own.
        raise ValueError(
            f"configuration of {name!r} could not be read ({error}): check "
            "--model.name_or_path; a directory needs the model's config.json, undamaged"
        ) from error
    for config in (settings, settings.get_text_config()):
        # A kernel of the hub, which transformers would fetch and run.
        kernel = config._attn_implementation
        if isinstance(kernel, str) and "/" in kernel and not section.trust_remote_code:
            raise ValueError(
                f"config.json of {name!r} names the attention {kernel!r}, which is code of the "
                "hub; needs one of transformers' own; leave attn_implementation out of the file, "
                "or trust the model's code"
            )
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            found = quantised if isinstance(quantised, dict) else quantised.to_dict()
            raise _quantised(name, f"with {found.get('quant_method', 'an unnamed method')}")
    return settings


def empty_model(settings: PreTrainedConfig, section: ModelSection, **given: Any) -> PreTrainedModel:
    """Builds the causal language model of a configuration on the meta device, without weights.

    Raises ValueError if transformers has none for it, or cannot build it.
    """
    name, trusted = section.name_or_path, section.trust_remote_code
    own = getattr(settings, "auto_map", None) or {}
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own:
        raise ValueError(
            f"model {name} is of type {settings.model_type!r}, for which transformers has no "
            "causal language model; needs a decoder such as Qwen3 or Llama; use such a model"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=trusted, **given)
    except Exception as error:
        # As above: values that do not go together are found where they are used.
        raise ValueError(
            f"model {name} cannot be built from its config.json ({type(error).__name__}: {error}); "
            "correct that file, or save or fetch the model again"
        ) from error


def stored_dtype(settings: PreTrainedConfig) -> torch.dtype:
    """Returns the dtype that config.json gives the weights; float32 if it gives none."""
    for config in (settings, settings.get_text_config()):
        if isinstance(config.dtype, torch.dtype):
            return config.dtype
    return torch.float32


def _quantised(name: str, how: str) -> ValueError:
    return ValueError(
        f"model {name} is quantised {how}; needs weights in float32, bfloat16 or float16; use the "
        "model that it was quantised from, or store it dequantised"
    )


def weight_files(path: str, *, cached_only: bool = False) -> list[Path]:
    """Returns the safetensors files of a model, as transformers chooses them; empty if it has none.

    path: a directory or a hub id, whose files are downloaded.
    cached_only: looks for a hub id in the cache alone.

    Raises OSError if a file cannot be fetched, and ValueError for a damaged index. A local file
    that the index names may be missing.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found = cached_file(
            path,
            name,
            local_files_only=cached_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not cached_only,
        )
        if found is not None and name == SAFE_WEIGHTS_NAME:
            return [Path(found)]
        if found is not None:
            files, _ = get_checkpoint_shard_files(path, found, local_files_only=cached_only)
            return [Path(file) for file in files]
    return []


class _Apart:
    """A stored tensor, unread, with a mapping of the file of its own. Its pages count as this
    process's memory until it is freed; those of a shared mapping, until all tensors are."""

    def __init__(self, file: Path, name: str, unread: Any) -> None:
        self._file, self._name = file, name
        self.get_shape, self.get_dtype = unread.get_shape, unread.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self._file, framework="pt") as opened:
            return opened.get_slice(self._name)[index]


@contextmanager
def _open_tensors(files: Iterable[Path], *, apart: bool = False) -> Iterator[dict[str, Any]]:
    """A context that yields the tensors of the files by name, unread.

    apart: each with a mapping of its own.
    """
    with ExitStack() as stack:
        tensors = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            unread = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            if apart:
                unread = {name: _Apart(file, name, tensor) for name, tensor in unread.items()}
            tensors |= unread
        yield tensors


def not_floats(tensors: Mapping[str, Any]) -> str | None:
    """Which of the tensors hold numbers of another kind than float64, float32, float16 and
    bfloat16, in words; None if none does.

    tensors: by name, unread, as safetensors' `get_slice` gives them.
    """
    dtypes = {name: tensor.get_dtype() for name, tensor in tensors.items()}
    others = [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    return f"{len(others)} tensors are no floats: {_first(others)}" if others else None


@contextmanager
def _without_report() -> Iterator[None]:
    """Silences transformers' report of missing and unused tensors, which ends here in an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Maps stored names to the names without what wrappers wrote into them.

    >>> unwrapped_names(["base_model.model.lm_head.weight", "module._orig_mod.model.norm.weight"])
    {'base_model.model.lm_head.weight': 'lm_head.weight',
     'module._orig_mod.model.norm.weight': 'model.norm.weight'}
    """
    found = {}
    for name in names:
        short, before = name, ""
        while short != before:
            short, before = _WRAPPERS.sub("", short), short
        found[name] = short
    return found


def _first(names: Iterable[str]) -> str:
    listed = sorted(names)
    left = len(listed) - _NUM_NAMED
    return ", ".join(listed[:_NUM_NAMED]) + (f" and {left} more" if left > 0 else "")


def _misfits(found: Mapping[str, Any], head: str | None) -> list[str]:
    """Returns in words what transformers found not to fit.

    head: name of the output head's weight.
    """
    missing, unused, shapes = (
        found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    said = []
    if missing:
        said.append(f"weights that no file holds: {len(missing)} ({_first(missing)})")
    if unused:
        said.append(f"stored tensors without a place in it: {len(unused)} ({_first(unused)})")
    if shapes:
        listed = (f"{name}: {list(came)} for {list(needed)}" for name, came, needed in shapes)
        said.append(f"stored tensors of another shape: {len(shapes)} ({_first(listed)})")
    if missing == {head}:
        said.append(
            "if the head is the embeddings, tie_word_embeddings in config.json has to be true"
        )
    if any("lora_" in name for name in unused):
        said.append("an adapter's matrices have to be merged into the weights")
    return said


def _fill(
    tensors: Mapping[str, Any], settings: PreTrainedConfig, section: ModelSection, **given: Any
) -> PreTrainedModel:
    """Returns the model with the tensors as its weights. Raises ValueError if they do not fit."""
    name, empty = section.name_or_path, empty_model(settings, section)
    short = unwrapped_names(tensors)
    try:
        with _without_report():
            loaded = type(empty).from_pretrained(
                None,
                config=settings,
                state_dict={short[name]: tensor for name, tensor in tensors.items()},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **given,
            )
    except RuntimeError as error:
        raise load_failure("model", name, error) from error
    assert isinstance(loaded, tuple), "asked for with output_loading_info"
    model, found = loaded
    names = {id(weight): n for n, weight in empty.named_parameters()}
    head = empty.get_output_embeddings()
    misfits = _misfits(found, None if head is None else names.get(id(head.weight)))
    if len(set(short.values())) < len(short):
        misfits.append("several tensors have the same name without their wrappers' prefixes")
    if misfits:
        raise ValueError(
            f"model {name}: the weights do not fit its config.json ({type(model).__name__}): "
            f"{'; '.join(misfits)}; needs files that fill every weight and no others; save or "
            "fetch the model again, or correct config.json"
        )
    # transformers takes it from its first argument. peft writes it into adapters.
    model.name_or_path = model.config.name_or_path = settings.name_or_path
    return model


@contextmanager
def _stored_tensors(
    path: str, section: ModelSection, *, cached_only: bool, apart: bool = False
) -> Iterator[dict[str, Any]]:
    """A context that yields a model's stored tensors as `_open_tensors` does. Raises ValueError for
    files that cannot be read and for tensors that hold no floating-point numbers."""
    name = section.name_or_path
    try:
        files = weight_files(path, cached_only=cached_only)
    except (OSError, ValueError) as error:
        raise load_failure("model", name, error) from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"model {name} lacks {len(missing)} of the {len(files)} files that its index names "
            f"({_first(missing)}); save or fetch it again"
        )
    try:
        with _open_tensors(files, apart=apart) as tensors:
            if others := not_floats(tensors):
                raise _quantised(name, f"({others})")
            yield tensors
    except (OSError, SafetensorError) as error:
        raise load_failure("model", name, error) from error


def stored_shapes(
    path: str, section: ModelSection, *, cached_only: bool = False
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's stored tensors, by name, without reading their values.

    cached_only: looks for a hub id in the cache alone; empty if it is not there.

    Raises ValueError for files that cannot be read and for tensors of no floating-point numbers.
    """
    with _stored_tensors(path, section, cached_only=cached_only) as tensors:
        return {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}


def _fill_empty(
    shapes: Mapping[str, Sequence[int]],
    settings: PreTrainedConfig,
    section: ModelSection,
    **given: Any,
) -> PreTrainedModel:
    """Returns the model on the meta device. transformers renames and merges tensors, such as the
    experts of one layer. So the load is its own, of tensors without values."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return _fill(tensors, settings, section, device_map={"": "meta"}, **given)


def load_weights(
    path: str,
    section: ModelSection,
    dtype: torch.dtype | None,
    say: Callable[[str], object] = print,
    *,
    device: torch.device | None = None,
    settings: PreTrainedConfig | None = None,
    apart: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model from safetensors only.

    path: what `resolve_model` returns for the section, or a directory with a whole model.
    dtype: of the weights; None = that of config.json.
    say: is called with a note if wrappers' prefixes were taken off the names.
    device: where the weights go; None = they stay on the CPU.
    settings: None = those of the path's config.json.
    apart: each weight can be freed alone. Otherwise the mapped pages of weights that need no cast
        are freed with the last of their file.

    Raises ValueError unless the files fill every weight with finite numbers and hold no others.
    """
    settings = settings or read_settings(path, section)
    with _stored_tensors(path, section, cached_only=False, apart=apart) as tensors:
        _tell_prefixes(tensors, section, say)
        model = _fill(tensors, settings, section, dtype=dtype or stored_dtype(settings))
    _check_tied_head(model, section.name_or_path)
    if device is not None:
        nn.Module.to(model, device)
    # On the device, since a GPU reads its memory a hundred times as fast as a CPU.
    check_finite(model, section.name_or_path)
    set_generation_config(model, path)
    return model


def load_empty(
    path: str,
    section: ModelSection,
    dtype: torch.dtype | None,
    shapes: Mapping[str, Sequence[int]],
) -> PreTrainedModel:
    """Builds on the meta device the model that `load_weights` loads, for a process that gets its
    weights from another one. It reads no weights.

    shapes: of the stored tensors, as `stored_shapes` returns them to the process that loads.

    Raises ValueError as `load_weights` does, except for values.
    """
    settings = read_settings(path, section)
    model = _fill_empty(shapes, settings, section, dtype=dtype or stored_dtype(settings))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if settings.get_text_config().tie_word_embeddings and head is not None:
        # Files may hold a tied head too, and transformers ties it where both have the same values.
        # `load_weights` has refused two different ones.
        head.weight = embeddings.weight
    set_generation_config(model, path)
    return model


def set_generation_config(model: PreTrainedModel, path: str) -> None:
    """Gives the model its generation_config.json, of which the stop tokens are used.

    Without that file, it keeps the settings that transformers derives from config.json.

    Raises ValueError for a file that transformers cannot use or that cannot be fetched, and for
    stop tokens outside of the model's vocabulary.
    """
    try:
        found = cached_file(
            path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        raise load_failure(GENERATION_CONFIG_NAME, path, error) from error
    if found is not None:
        model.generation_config = _read_generation_config(Path(found))
    settings = model.generation_config
    if settings is None:
        return
    where = found or f"{path}: config.json"
    stops = checked(_Stops, {"eos_token_id": settings.eos_token_id}, where, _ASK_AGAIN).eos_token_id
    largest = max(stops if isinstance(stops, list) else [stops or 0], default=0)
    num_tokens = model.config.get_text_config().vocab_size
    if largest >= num_tokens:
        raise BadFile(
            f"{where}: eos_token_id: got {str(largest)[:60]}; needs ids below {num_tokens}, the "
            f"size of the model's vocabulary; {_ASK_AGAIN}"
        )


_ASK_AGAIN = "correct it, or save or fetch the model again"
_Token = Annotated[int, Field(ge=0)]


class _Stops(Record):
    eos_token_id: _Token | list[_Token] | None = None


class _Generation(_Stops):
    """What an export passes on. transformers takes values of any type."""

    # Some published models have -1 for none.
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def _read_generation_config(file: Path) -> GenerationConfig:
    """Raises BadFile."""
    # In the hub's cache it is a link.
    values = read_json(file.resolve(), dict[str, Any], remedy=_ASK_AGAIN, constants=True)
    checked(_Generation, values, str(file), _ASK_AGAIN)
    # transformers sets every key as an attribute.
    if taken := sorted(name for name in values if hasattr(GenerationConfig, name)):
        raise BadFile(
            f"{file}: got the key {taken[0][:60]!r}, which is not a setting; needs settings of "
            f"transformers' GenerationConfig; {_ASK_AGAIN}"
        )
    try:
        settings = GenerationConfig.from_dict(values)
        settings.to_json_string()
    except Exception as error:
        # Each setting is checked in its own way, or fails where the file is written again.
        raise BadFile(
            f"{file}: transformers cannot use it ({type(error).__name__}: {str(error)[:200]}); "
            f"needs settings of its GenerationConfig; {_ASK_AGAIN}"
        ) from error
    return settings


def _wrapped(names: Iterable[str]) -> list[str]:
    return [name for name, short in unwrapped_names(names).items() if name != short]


def _carry_prefixes(name: str, wrapped: list[str]) -> str:
    return f"the stored weights of {name} carry prefixes of a wrapper ({_first(wrapped)})"


def _tell_prefixes(
    names: Iterable[str], section: ModelSection, say: Callable[[str], object]
) -> None:
    if wrapped := _wrapped(names):
        say(f"note: {_carry_prefixes(section.name_or_path, wrapped)}, which are taken off")


def refuse_prefixes(path: str) -> None:
    """Raises ValueError if stored names carry prefixes of a wrapper, for programs that read the
    files themselves.

    path: a directory or a hub id.
    """
    if Path(path).is_absolute() and not Path(path).is_dir():
        return  # vLLM names it.
    with _open_tensors(weight_files(path, cached_only=True)) as tensors:
        wrapped = _wrapped(tensors)
    if wrapped:
        raise ValueError(
            f"{_carry_prefixes(path, wrapped)}; vLLM needs the model's own names; save the model "
            "itself and not its wrapper, or use --rollout.engine builtin (--engine builtin in an "
            "evaluation), which takes the prefixes off"
        )


def check_stored(
    path: str, section: ModelSection, say: Callable[[str], object] = lambda text: None
) -> bool:
    """Checks the names, shapes and dtypes of the stored weights without reading them.

    say: as in `load_weights`.

    Returns False if there was nothing to check: the model is on the hub and not in the cache.
    Raises ValueError as `load_weights` does, except for values.
    """
    settings = read_settings(path, section)
    shapes = stored_shapes(path, section, cached_only=True)
    if not shapes:
        return False
    _tell_prefixes(shapes, section, say)
    _fill_empty(shapes, settings, section)
    return True


def _check_tied_head(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError if the configuration ties the head to the embeddings and the files hold two
    different ones. transformers then keeps both."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and head is not None and head.weight is not embeddings.weight:
        raise ValueError(
            f"model {name}: config.json ties the head to the embeddings, but the files hold two "
            "different ones; needs one of the two; set tie_word_embeddings to false in "
            "config.json, or leave the head out of the files"
        )


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Raises ValueError if a weight holds NaN or infinite values.

    name: what the message calls the model.
    """
    bad = []
    # The state also holds stored buffers, such as the biases of a router.
    for place, weight in model.state_dict().items():
        # A norm takes one pass and no memory. It is not finite if an entry is not, or if it
        # overflows; the second look tells.
        if weight.is_floating_point() and not torch.linalg.vector_norm(weight).isfinite():
            num_bad = int((~torch.isfinite(weight)).sum())
            if num_bad:
                bad.append(f"{place}: {num_bad} of {weight.numel()}")
    if bad:
        raise ValueError(
            f"model {name} has NaN or infinite values among its weights ({_first(bad)} entries); "
            "needs finite weights; save or fetch the model again, or use an earlier checkpoint of "
            "it"
        )
