"""Files that do not fill their model are refused, and nothing is initialised at random."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from paint_engine.config.sections import ModelSection
from paint_engine.evaluation.target import find_target
from paint_engine.files import BadFile
from paint_engine.model.load import resolve_model
from paint_engine.model.stored import (
    check_stored,
    load_failure,
    load_weights,
    read_settings,
    refuse_prefixes,
    set_generation_config,
    unwrapped_names,
    weight_files,
)

Weights = dict[str, Tensor]


def changed(
    source: Path,
    directory: Path,
    weights: Callable[[Weights], Weights] = lambda weights: weights,
    **config: Any,
) -> tuple[str, ModelSection]:
    """A copy of a model with other weights and other keys in config.json."""
    shutil.copytree(source, directory)
    file = directory / "model.safetensors"
    save_file(weights(load_file(file)), file, metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | config))
    return str(directory), ModelSection(name_or_path=str(directory), dtype="float32")


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


def renamed(change: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {change(name): w for name, w in weights.items()}


def cast(name: str, dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: weights[name].to(dtype)}


def test_an_attention_that_is_code_of_the_hub_is_refused(model_dir: Path, tmp_path: Path) -> None:
    path, section = changed(model_dir, tmp_path / "m", attn_implementation="their/kernel:attend")
    with pytest.raises(ValueError, match="names the attention 'their/kernel:attend', which is co"):
        read_settings(path, section)


NORM = "model.norm.weight"

MISFITS = {
    "no head": (
        {"tie_word_embeddings": False},
        lambda w: w,
        r"weights that no file holds: 1 \(lm_head.weight\); if the head is the embeddings",
    ),
    "no layer": ({}, without("layers.1."), r"no file holds: 11 \(.* and 8 more\)"),
    "a spare layer": (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        lambda w: w,
        r"without a place in it: 11 \(model.layers.1.input_layernorm.weight",
    ),
    "another shape": (
        {"intermediate_size": 64},
        lambda w: w,
        r"stored tensors of another shape: 6 \(model.layers.0.mlp.down_proj.weight: \[\d+, \d+\]"
        r" for \[\d+, 64\]",
    ),
    "an unmerged adapter": (
        {},
        lambda w: w | {"base_model.model.model.norm.lora_A.weight": torch.zeros(2, 2)},
        "adapter's matrices have to be merged",
    ),
    "a name twice": (
        {},
        lambda w: w | {f"module.{NORM}": w[NORM].clone()},
        "several tensors have the same name",
    ),
    "integers": ({}, cast(NORM, torch.int8), rf"1 tensors are no floats: {NORM}: I8"),
    "float8": ({}, cast(NORM, torch.float8_e4m3fn), rf"{NORM}: F8_E4M3"),
    "a method": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        lambda w: w,
        "is quantised with gptq; needs .*; use the model that it was quantised from",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_by_headers_and_by_load(
    name: str, model_dir: Path, tmp_path: Path
) -> None:
    config, weights, message = MISFITS[name]
    path, section = changed(model_dir, tmp_path / "model", weights, **config)
    with pytest.raises(ValueError, match=message) as by_headers:
        check_stored(path, section)
    with pytest.raises(ValueError, match=message) as by_load:
        load_weights(path, section, torch.float32)
    assert str(by_headers.value) == str(by_load.value)
    assert path in str(by_load.value)


@pytest.mark.parametrize(
    ("wrap", "short"),
    [
        (lambda n: f"base_model.model.{n}", False),
        (lambda n: f"_orig_mod.{n}", False),
        (lambda n: f"module._orig_mod.{n}", False),
        (lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), True),
        (lambda n: n.replace("model.", "model._orig_mod._fsdp_wrapped_module."), True),
    ],
)
def test_the_prefixes_of_wrappers_are_taken_off_and_told(
    wrap: Callable[[str], str], short: bool, model_dir: Path, tmp_path: Path
) -> None:
    path, section = changed(model_dir, tmp_path / "model", renamed(wrap))
    said: list[str] = []
    plain_path = str(model_dir)
    plain = load_weights(plain_path, ModelSection(name_or_path=plain_path), None, said.append)
    assert said == []
    model = load_weights(path, section, None, said.append)
    assert len(said) == 1 and "prefixes of a wrapper" in said[0] and path in said[0]
    assert check_stored(path, section, said.append) and said[0] == said[1]
    expected = plain.state_dict()
    assert {n: w.tolist() for n, w in model.state_dict().items()} == {
        n: w.tolist() for n, w in expected.items()
    }
    with pytest.raises(ValueError, match="vLLM needs the model's own names"):
        refuse_prefixes(path)
    # What is saved has the model's own names again.
    model.save_pretrained(str(tmp_path / "saved"))
    assert check_stored(str(tmp_path / "saved"), section)
    refuse_prefixes(str(tmp_path / "saved"))


def test_a_model_s_own_names_are_left_alone() -> None:
    names = ["model.modules.0.weight", "model.module_list.weight", "orig_mod.weight"]
    assert unwrapped_names(names) == {name: name for name in names}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    value: float, model_dir: Path, tmp_path: Path
) -> None:
    def spoil(weights: Weights) -> Weights:
        weights[NORM][3] = value
        return weights

    path, section = changed(model_dir, tmp_path / "model", spoil)
    with pytest.raises(ValueError, match=rf"NaN or infinite .*{NORM}: 1 of \d+"):
        load_weights(path, section, torch.float32)


def test_finite_weights_whose_sum_overflows_are_accepted(model_dir: Path, tmp_path: Path) -> None:
    def enlarge(weights: Weights) -> Weights:
        weights[NORM][:] = 3e38
        return weights

    path, section = changed(model_dir, tmp_path / "model", enlarge)
    loaded = load_weights(path, section, torch.float32)
    assert torch.equal(loaded.state_dict()[NORM], torch.full_like(loaded.state_dict()[NORM], 3e38))


def test_a_tied_head_may_be_stored_if_it_is_the_embeddings(model_dir: Path, tmp_path: Path) -> None:
    def with_head(factor: float) -> Callable[[Weights], Weights]:
        return lambda w: w | {"lm_head.weight": factor * w["model.embed_tokens.weight"]}

    path, section = changed(model_dir, tmp_path / "same", with_head(1.0))
    model = load_weights(path, section, torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    path, section = changed(model_dir, tmp_path / "other", with_head(2.0))
    with pytest.raises(ValueError, match="the files hold two different ones"):
        load_weights(path, section, torch.float32)


def test_sharded_files_are_read_and_a_missing_one_is_named(
    model_dir: Path, untied_model_dir: Path, tmp_path: Path
) -> None:
    section = ModelSection(name_or_path=str(untied_model_dir))
    whole = load_weights(str(untied_model_dir), section, torch.float32)
    directory = tmp_path / "sharded"
    whole.save_pretrained(str(directory), max_shard_size="40KB")
    section = ModelSection(name_or_path=str(directory))
    files = weight_files(str(directory))
    assert len(files) > 1
    assert check_stored(str(directory), section)
    again = load_weights(str(directory), section, torch.float32)
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    files[-1].unlink()
    for load in (check_stored, lambda *given: load_weights(*given, None)):
        with pytest.raises(ValueError, match=files[-1].name):
            load(str(directory), section)


def test_experts_that_are_stored_one_by_one_fill_the_fused_ones(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(str(tmp_path / "moe"))
    section = ModelSection(name_or_path=str(tmp_path / "moe"))
    assert check_stored(str(tmp_path / "moe"), section)
    assert any(".experts.2." in name for name in load_file(tmp_path / "moe" / "model.safetensors"))
    path, section = changed(tmp_path / "moe", tmp_path / "fewer", without(".experts.2."))
    with pytest.raises(ValueError, match=r"another shape: .*experts"):
        check_stored(path, section)


def test_the_cache_may_lack_a_hub_model() -> None:
    assert weight_files("someone/none", cached_only=True) == []
    refuse_prefixes("someone/none")


def test_a_hub_model_that_is_not_cached_cannot_be_checked(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paint_engine.model.stored.weight_files", lambda path, **_: [])
    assert not check_stored(str(model_dir), ModelSection(name_or_path=str(model_dir)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "of type 't5', for which transformers has no causal language model"),
        ({"model_type": "no-such"}, "configuration of .* could not be read"),
        ({"hidden_size": "big"}, "configuration of .* could not be read .*hidden_size"),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "cannot be built .*odd"),
    ],
)
def test_a_configuration_without_a_model_is_refused(
    config: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    path, section = changed(model_dir, tmp_path / "model", **config)
    for load in (check_stored, lambda *given: load_weights(*given, None)):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load(path, section)


def test_a_failure_is_one_line_and_names_a_bundled_model_of_nearly_that_name() -> None:
    error = OSError("cannot connect\nto the hub")
    message = str(load_failure("model", "tiny-teachr", error))
    assert "'tiny-teachr' could not be loaded (OSError: cannot connect to the hub): " in message
    assert message.endswith("; did you mean tiny-teacher?") and "\n" not in message
    assert "did you mean" not in str(load_failure("model", "Qwen/Qwen3-8B", error))


def test_a_damaged_index_is_named(untied_model_dir: Path, tmp_path: Path) -> None:
    path, section = changed(untied_model_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=f"'{path}' could not be loaded .*damaged"):
        check_stored(path, section)


GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *(("[]", "got []"), ("5", "got 5"), ("[" * 100_000, "nested too deeply"), ("", "JSON")),
        *((text, "not valid JSON") for text in (b"\xff\xfe", b"{", b'{"eos_token_id": "\xff"}')),
        *(({"eos_token_id": stop}, "eos_token_id") for stop in ("x", [[1]], {"a": 1}, True, 1.5)),
        *(({"eos_token_id": stop}, "eos_token_id") for stop in (10**30, -5, [3, 10**6], [-1])),
        *(
            ({"watermarking_config": value}, "transformers cannot use it")
            for value in (5, {"a": 1})
        ),
        *(({name: "x"}, name) for name in ("temperature", "top_k", "top_p", "do_sample")),
        *(({name: 5}, f"the key '{name}'") for name in ("to_json_file", "update", "__class__")),
        ({"compile_config": 5, "pad_token_id": "x"}, "pad_token_id"),
        ({"cache_implementation": "evil"}, "transformers cannot use it"),
    ],
)
def test_a_crafted_generation_config_is_refused_by_name(
    content: Any, said: str, model_dir: Path, tmp_path: Path
) -> None:
    path, section = changed(model_dir, tmp_path / "model")
    text = json.dumps(content) if isinstance(content, dict) else content
    file = tmp_path / "model" / GENERATION
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadFile) as refused:
        load_weights(path, section, None)
    message = str(refused.value)
    assert message.startswith(str(file)) and said in message and len(message) < 600


@pytest.mark.parametrize(
    "settings",
    [
        # Of Qwen3, of Gemma 3 and of Llama 3, with ids of the test's vocabulary.
        {
            **{"bos_token_id": 3, "do_sample": True, "eos_token_id": [5, 3], "pad_token_id": 3},
            **{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"},
        },
        {
            **{"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 16]},
            **{"top_k": 64, "top_p": 0.95, "transformers_version": "4.50.0.dev0"},
        },
        {"_from_model_config": True, "eos_token_id": 5, "pad_token_id": -1, "temperature": 1},
        {"eos_token_id": None, "chat_format": "chatml", "max_window_size": 6144},
        {"eos_token_id": []},
    ],
)
def test_settings_of_published_models_are_taken(
    settings: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    path, section = changed(model_dir, tmp_path / "model")
    (tmp_path / "model" / GENERATION).write_text(json.dumps(settings))
    loaded = load_weights(path, section, None).generation_config
    assert loaded is not None and loaded.eos_token_id == settings["eos_token_id"]


def test_without_that_file_the_stop_tokens_of_config_json_are_checked(
    model_dir: Path, tmp_path: Path
) -> None:
    path, _ = changed(model_dir, tmp_path / "model")
    (tmp_path / "model" / GENERATION).unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    set_generation_config(model, path)
    model.generation_config.eos_token_id = 10**9
    with pytest.raises(BadFile, match=r"model: config.json: eos_token_id: got 1000000000; needs"):
        set_generation_config(model, path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", GENERATION, "tokenizer.json"])
def test_a_pipe_in_a_model_is_refused_and_does_not_hang(
    name: str, model_dir: Path, tmp_path: Path
) -> None:
    path, section = changed(model_dir, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "model" / name)
    target = find_target(path, None, "float32", trust_remote_code=False)
    for use in (
        lambda: resolve_model(section),
        lambda: read_settings(path, section),
        lambda: check_stored(path, section),
        lambda: target.identity("builtin", torch.float32),
    ):
        with pytest.raises(BadFile, match=f"{name} is a named pipe; needs a regular file; remove"):
            use()
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("/dev/zero")
    with pytest.raises(BadFile, match=f"{name} is a device"):
        resolve_model(section)


def test_links_of_the_hub_s_cache_are_followed(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in model_dir.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "nowhere")
    section = ModelSection(name_or_path=str(tmp_path / "model"), dtype="float32")
    linked = load_weights(resolve_model(section), section, None)
    whole = load_weights(str(model_dir), section, None)
    for name, weight in whole.state_dict().items():
        assert torch.equal(linked.state_dict()[name], weight)
