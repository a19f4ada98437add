"""Adapters that others have trained: every flavour of LoRA that peft writes is merged to the logits
that it has switched on, in training's sampler and in an export; the rest is refused by name."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from paint_engine import evaluate, export
from paint_engine.checkpoint import patterns
from paint_engine.checkpoint.adapters.config import largest_rank, read_adapter_config
from paint_engine.checkpoint.adapters.fit import check_vllm_loads
from paint_engine.checkpoint.merge import check_against_base
from paint_engine.config.sections import ModelSection
from paint_engine.distributed import World
from paint_engine.evaluation.target import build_engine, find_target, skeleton
from paint_engine.files import BadFile
from paint_engine.rollout import RolloutEngine, SamplingParams

IDS = torch.arange(3, 60)[None]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Directories of random models: tied and untied, with biases, with experts."""
    root = tmp_path_factory.mktemp("bases")
    (stop,) = tokenizer.encode("<|im_end|>")
    shape = SHAPE | {"vocab_size": len(tokenizer) + 6, "eos_token_id": stop}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    models = {
        "tied": Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)),
        "untied": Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False)),
        "biased": Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, head_dim=16)),
        "wide": Qwen3ForCausalLM(Qwen3Config(**(shape | {"hidden_size": 64}), head_dim=16)),
        "more_tokens": Qwen3ForCausalLM(
            Qwen3Config(**(shape | {"vocab_size": shape["vocab_size"] + 8}), head_dim=16)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def load(directory: Path) -> Any:
    """In float64, so that two ways of computing one thing agree to the weights' own rounding."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return nn.Module.to(model, torch.float64).eval()(input_ids=IDS).logits


def train(base: Path, config: PeftConfig, directory: Path) -> Tensor:
    """Saves an adapter with an update everywhere, as peft writes it. Returns its logits."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # peft's own advice to who trains such an adapter.
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(load(base), directory)
    return logits(loaded)


ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FLAVOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("tied", {}),
    "rslora": ("tied", {"use_rslora": True, "lora_alpha": 16}),
    "dora": ("tied", {"use_dora": True}),
    "bias all": ("biased", {"bias": "all"}),
    "bias lora_only": ("biased", {"bias": "lora_only"}),
    "lora_bias": ("biased", {"lora_bias": True}),
    "norm saved": ("tied", {"modules_to_save": ["norm"]}),
    "blocks saved": ("tied", {"modules_to_save": ["mlp"]}),
    "head saved": ("untied", {"modules_to_save": ["lm_head"]}),
    "tied head saved": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied embeddings saved": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "both saved as one": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "patterns": (
        "tied",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "a regular expression": ("tied", {"target_modules": r".*\.1\..*(q|k)_proj"}),
    "some layers": ("tied", {"layers_to_transform": [1]}),
    "embeddings and head": ("untied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embeddings, dora": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both as one": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tokens": ("untied", {"trainable_token_indices": [3, 5, 17]}),
    "tied tokens": ("tied", {"trainable_token_indices": [3, 5, 17]}),
    "experts": ("experts", {"target_parameters": EXPERTS}),
    "one expert matrix": ("experts", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "gaussian": ("tied", {"init_lora_weights": "gaussian"}),
}


def lora(settings: Mapping[str, Any]) -> LoraConfig:
    common = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(common | dict(settings)))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merged_it_computes_what_it_computes_switched_on(
    flavour: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings = FLAVOURS[flavour]
    on = train(bases / name, lora(settings), tmp_path / "adapter")
    assert (on - logits(load(bases / name))).abs().max() > 0.05
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    torch.testing.assert_close(logits(load(tmp_path / "out")), on, rtol=0, atol=1e-5)
    assert "float32: 100.0% of" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    is_two = flavour.startswith("tied ") and flavour != "tied tokens"
    assert config["tie_word_embeddings"] == (name in ("tied", "biased") and not is_two)


def test_the_update_of_experts_is_counted(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = lora({"target_modules": [], "target_parameters": EXPERTS})
    train(bases / "experts", config, tmp_path / "adapter")
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    # Per layer: 4 experts of 2 x 24 x 32 and of 32 x 24.
    assert f"100.0% of {2 * 4 * 3 * 24 * 32:,} updated weights in 4 tensors" in (
        capsys.readouterr().out
    )


def test_a_bfloat16_base_does_not_round_what_the_adapter_holds_whole(
    bases: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases / "biased", base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    settings = {"bias": "all", "modules_to_save": ["norm"], "trainable_token_indices": [3, 5]}
    train(bases / "biased", lora(settings), tmp_path / "adapter")
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--model", str(base)])
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    stored = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(stored[name], kept[f"base_model.model.{name}"])
    assert torch.equal(stored["model.norm.weight"], kept["base_model.model.model.norm.weight"])
    rows = kept["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(stored["model.embed_tokens.weight"][[3, 5]], rows)


def sampled(engine: RolloutEngine) -> list[Any]:
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=12,
        stop_token_ids=(1,),
        vocab_size=300,
    )
    return [c.token_ids for c in engine.generate([[5, 6, 7], [8, 9]], [0, 1], params)]


@pytest.mark.parametrize("flavour", ["dora", "bias all", "tied head saved", "tied tokens"])
def test_an_evaluation_samples_from_it(flavour: str, bases: Path, tmp_path: Path) -> None:
    """The same tokens by the adapter and by its export, and others by the base."""
    name, settings = FLAVOURS[flavour]
    train(bases / name, lora(settings), tmp_path / "adapter")
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    found = []
    for model, adapter in (
        (bases / name, str(tmp_path / "adapter")),
        (tmp_path / "out", None),
        (bases / name, None),
    ):
        target = find_target(str(model), adapter, "float32", trust_remote_code=False)
        engine = build_engine(
            target,
            skeleton(target),
            World(0, 1, 0, torch.device("cpu")),
            kind="builtin",
            max_model_len=64,
            max_sequences=4,
            gpu_memory_utilization=0.5,
            tensor_parallel_size=1,
        )
        found.append(sampled(engine))
    assert found[0] == found[1] != found[2]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def refusal(
    bases: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """What the evaluation and the export say of an adapter, which is the same."""
    rows = write_rows(tmp_path / "rows.jsonl", 2)

    def refused(adapter: Path, base: str = "tied") -> str:
        model = ["--model", str(bases / base)]
        commands = [
            (evaluate.main, [*model, "--adapter", str(adapter), "--benchmarks", str(rows)]),
            (export.main, [str(adapter), str(tmp_path / "out"), *model]),
            (export.main, [str(adapter), str(tmp_path / "out"), *model, "--form", "adapter"]),
        ]
        commands[0][1].extend(["--device", "cpu", "--engine", "builtin", "--max-new-tokens", "4"])
        commands[0][1].extend(["--output", str(tmp_path / "evaluation"), "--num-samples", "1"])
        messages = set()
        for command, arguments in commands:
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                command(arguments)
            assert ended.value.code == 2
            messages.add(capsys.readouterr().out.partition("error: ")[2])
        assert not (tmp_path / "out").exists() and not (tmp_path / "evaluation").exists()
        (message,) = messages
        assert message.count("\n") == 1, message
        return message

    return refused


METHODS: dict[str, PeftConfig] = {
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "IA3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=[]
    ),
    "LOHA": LoHaConfig(task_type="CAUSAL_LM", target_modules=ATTENTION),
    "LOKR": LoKrConfig(task_type="CAUSAL_LM", target_modules=ATTENTION),
    "TRAINABLE_TOKENS": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(
    method: str, bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(bases / "tied"), METHODS[method]
        )
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    message = refusal(tmp_path / "adapter")
    assert f"is of the method {method} (peft_type in adapter_config.json); needs LORA" in message


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', with which peft changes"),
    "niter": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    "alora": ({"alora_invocation_tokens": [3]}, "LoRA settings alora_invocation_tokens = [3]"),
    "qalora": ({"use_qalora": True}, "LoRA settings use_qalora = true"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = [[0, 2], [1, 2]]"),
    "another module": ({"megatron_core": "theirs"}, 'LoRA settings megatron_core = "theirs"'),
    "a later peft's": ({"use_zora": {"depth": 2}}, 'LoRA settings use_zora = {"depth": 2}'),
    "task": ({"task_type": "SEQ_CLS"}, "is for the task SEQ_CLS (task_type in"),
    "no method": ({"peft_type": None}, "is of the method None"),
    "no rank": ({"r": None}, "adapter_config.json: r: got None; needs: a valid integer; save"),
    "odd ranks": (
        {"rank_pattern": [4]},
        "adapter_config.json: rank_pattern: got [4]; needs: a valid dict",
    ),
    "negative rank": (
        {"rank_pattern": {"q_proj": -1}},
        "adapter_config.json: rank_pattern.q_proj: got -1; needs: great",
    ),
    "odd layers": ({"layers_to_transform": 1, "target_modules": "q"}, "cannot be used when"),
    "far token": ({"trainable_token_indices": [9999]}, "it trains the token 9999, and the base's"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_settings_are_refused_by_name(
    case: str, bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    train(bases / "tied", lora({}), tmp_path / "adapter")
    changes, message = SETTINGS[case]
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in refusal(tmp_path / "adapter")


@pytest.fixture(scope="module")
def plain(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "adapter"
    train(bases / "tied", lora({}), directory)
    return directory


HUGE = 4611686018427387904
CRAFTED: list[tuple[str, dict[str, Any]]] = [
    *(("r", {"r": value}) for value in (HUGE, 10**30, True, 0, "4", 4.0)),
    *(("rank_pattern", {"rank_pattern": v}) for v in (3, {"q_proj": HUGE}, {"q_proj": True})),
    *(("rank_pattern, 1: got '", {"rank_pattern": {k: 4}}) for k in ("(", "(" * 5000, "a**")),
    *(("alpha_pattern", {"alpha_pattern": v}) for v in (5, {"v": "x"}, {"v": 1e308}, {"(": 4})),
    *(("lora_alpha", {"lora_alpha": value}) for value in (10**400, 1e308, "x", None, {}, True)),
    *(("lora_dropout", {"lora_dropout": value}) for value in ("x", [1], -1, 2.0)),
    *(("target_modules", {"target_modules": v}) for v in ("(", [5], 5, {"a": 1}, [["a"]])),
    *(("exclude_modules", {"exclude_modules": value}) for value in ("(", 5, [5], "[b-a]")),
    *(("layers_pattern", {"layers_pattern": v, "layers_to_transform": [0]}) for v in ("(", 5)),
    *(("layers_to_transform", {"layers_to_transform": v}) for v in ("x", [10**30], -1)),
    *(("modules_to_save", {"modules_to_save": v}) for v in (5, [5], ["nonexistent"], ["("])),
    *(("target_parameters", {"target_parameters": value}) for value in (5, [5], ["x"])),
    *(("token", {"trainable_token_indices": v}) for v in (5, ["a"], "abc", {"a": 5}, [-1])),
    *(("'a'", {"trainable_token_indices": v}) for v in ({"a": [5]}, {"a": [5, 6]})),
    *(("bias", {"bias": value}) for value in ("weird", 5, None)),
    *(("use_rslora", {"use_rslora": value}) for value in ({"a": 1}, "yes", 1)),
    *(("use_dora", {"use_dora": value}) for value in ("x", 1)),
    ("fan_in_fan_out", {"fan_in_fan_out": "yes"}),
    ("ensure_weight_tying", {"ensure_weight_tying": "x", "modules_to_save": ["lm_head"]}),
    *(("init_lora_weights", {"init_lora_weights": v}) for v in ([1], None, "x" * 5000)),
    *(("base_model_name_or_path", {"base_model_name_or_path": v}) for v in (5, [1], "/" * 5000)),
    *((name, {name: 5}) for name in ("revision", "peft_version", "auto_mapping", "eva_config")),
    *(("loftq_config", {"loftq_config": value}) for value in (5, {"a": 1})),
    ("corda_config.a = 1", {"corda_config": {"a": 1}}),
    ("xxx = 1, y = 1", {"x" * 100_000: 1, "y": 1}),
    ("of the method ['LORA']", {"peft_type": ["LORA"]}),
    ("task", {"task_type": {"a": "b" * 10_000}}),
]


@pytest.mark.parametrize("number", range(len(CRAFTED)))
def test_a_crafted_setting_is_refused_in_a_short_message_with_its_name(
    number: int, plain: Path, bases: Path, tmp_path: Path
) -> None:
    said, changes = CRAFTED[number]
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError) as refused:
        check_against_base(adapter, ModelSection(name_or_path=str(bases / "tied")))
    message = str(refused.value)
    assert said in message and str(adapter) in message
    assert len(message) < 1000 and "torch" not in message and "\n" not in message


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_explodes_is_refused_in_time(
    name: str, plain: Path, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_TIME_LIMIT_S", 1.0)
    adapter, explodes = shutil.copytree(plain, tmp_path / "adapter"), "(([a-z_.0-9])+)+!"
    file = adapter / "adapter_config.json"
    value = {explodes: 4} if name == "rank_pattern" else explodes
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(BadFile, match=f"{name}.*needs a regular expression .* within 1 s .*name"):
        check_against_base(adapter, ModelSection(name_or_path=str(bases / "tied")))


@pytest.mark.parametrize("name", ["/root/" + "a" * 300, "a--b", "../..", "a\0b", "a/b/c/d", "~"])
def test_a_base_that_is_not_here_is_no_obstacle(
    name: str, plain: Path, bases: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    changes = {"base_model_name_or_path": name}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    check_against_base(adapter, ModelSection(name_or_path=str(bases / "tied")))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "F8_E8M0", "I32", "BOOL", "C64"])
def test_weights_that_are_no_floats_are_refused(
    dtype: str, plain: Path, bases: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 0]}})
    num_bytes = {"F4": 1, "I32": 8, "C64": 16}.get(dtype, 2)
    header = header.replace("[0, 0]", f"[0, {num_bytes}]").encode()
    content = len(header).to_bytes(8, "little") + header + bytes(num_bytes)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(BadFile, match=rf"1 tensors are no floats: x: {dtype}\).*needs weights in"):
        check_against_base(adapter, ModelSection(name_or_path=str(bases / "tied")))


def test_an_update_that_overflows_is_not_exported(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(bases / "tied", lora({}), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    large = {name: weight * 1e25 for name, weight in load_file(file).items()}
    save_file(large, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert "has NaN or infinite values among its weights" in capsys.readouterr().out


def test_settings_that_a_later_peft_adds_and_leaves_off_are_taken(
    bases: Path, tmp_path: Path
) -> None:
    train(bases / "tied", lora({}), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    off = {"use_zora": False, "zora_config": None, "zora_layers": []}
    off |= {"runtime_config": {"ephemeral_gpu_offload": False}}
    file.write_text(json.dumps(json.loads(file.read_text()) | off))
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").is_file()


BASES = {
    "another hidden size": ("wide", "q_proj.lora_A.weight has the shape (4, 32), and the base"),
    "another vocabulary": ("more_tokens", "it was trained on a model of vocab_size"),
    "another kind": ("biased", "it was trained on a model of model_type qwen3, and this one"),
}


@pytest.mark.parametrize("case", BASES)
def test_an_adapter_of_another_base_is_refused(
    case: str, bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    base, message = BASES[case]
    train(bases / "untied", lora({}), tmp_path / "adapter")
    said = refusal(tmp_path / "adapter", base)
    assert "does not fit the model" in said and message in said
    assert f"according to its configuration '{bases / 'untied'}'" in said


UNKNOWN_BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another hidden size": ("wide", {}, "q_proj.lora_A.weight has the shape (4, 32), and the base"),
    "another vocabulary": (
        "more_tokens",
        {"target_modules": ["embed_tokens", "q_proj"]},
        # peft saves the base's embeddings beside adapters on them.
        "embed_tokens.base_layer.weight has the shape",
    ),
    "another vocabulary, saved": (
        "more_tokens",
        {"modules_to_save": ["lm_head"]},
        "lm_head.weight has the shape",
    ),
    "no experts": ("tied", {"target_parameters": EXPERTS}, "and the base needs none; so for"),
}


@pytest.mark.parametrize("case", UNKNOWN_BASES)
def test_an_adapter_of_a_base_that_is_not_here_is_refused_by_its_shapes(
    case: str, bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    base, settings, message = UNKNOWN_BASES[case]
    trained_on = "experts" if case == "no experts" else "untied"
    train(bases / trained_on, lora(settings), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    name = {"base_model_name_or_path": "someone/model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | name))
    said = refusal(tmp_path / "adapter", base)
    assert "does not fit the model" in said and message in said
    assert "according to its configuration 'someone/model'" in said


FILES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "left over": (
        lambda w: w | {"base_model.model.model.layers.0.mlp.x.lora_A.weight": torch.ones(4, 32)},
        "mlp.x.lora_A.weight has the shape (4, 32), and the base needs none; so for 1 of 9 tensors",
    ),
    "missing": (
        lambda w: {n: t for n, t in w.items() if ".layers.1." not in n},
        "has the shape none, and the base needs (4, 32); so for 4 of 8 tensors",
    ),
    "other names": (
        lambda w: {n.removeprefix("base_model.model."): t for n, t in w.items()},
        "so for 16 of 16 tensors",
    ),
    "NaN": (
        lambda w: {n: t * torch.nan if ".lora_B." in n else t for n, t in w.items()},
        "has NaN or infinite values in base_model.model.model.layers.0.self_attn.q_proj.lora_B."
        "weight, base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight, base_model.model."
        "model.layers.1.self_attn.q_proj.lora_B.weight and 1 more",
    ),
    "infinity": (
        lambda w: {n: t / 0 if ".0.self_attn.q_proj.lora_A." in n else t for n, t in w.items()},
        "has NaN or infinite values in base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_the_configuration_s_is_refused(
    case: str, bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    train(bases / "tied", lora({}), tmp_path / "adapter")
    change, message = FILES[case]
    file = tmp_path / "adapter/adapter_model.safetensors"
    changed = {n: t.contiguous() for n, t in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})
    assert message in refusal(tmp_path / "adapter")


def test_a_configuration_that_cannot_be_read_is_named(
    bases: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    train(bases / "tied", lora({}), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    assert "adapter_config.json: not valid JSON (" in refusal(tmp_path / "adapter")


def test_a_bias_that_the_base_has_no_place_for_goes_out_as_an_adapter(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(bases / "tied", lora({"lora_bias": True}), tmp_path / "adapter")
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert "lora_bias on layers of the base that have no bias" in capsys.readouterr().out
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--form", "adapter"])
    printed = capsys.readouterr().out
    assert "vLLM does not load it, because of lora_bias = true: use peft, or --form" in printed


# ---- vLLM ----------------------------------------------------------------------------------------

VLLM: dict[str, str | None] = {
    "plain": None,
    "rslora": None,
    "patterns": None,
    "some layers": None,
    "gaussian": None,
    "dora": "use_dora = true",
    "bias all": 'bias = "all"',
    "bias lora_only": 'bias = "lora_only"',
    "lora_bias": "lora_bias = true",
    "norm saved": 'modules_to_save = ["norm"]',
    "tied embeddings": "adapters on the embeddings or the head",
    "tied head": "adapters on the embeddings or the head",
    "tokens": "trainable_token_indices = [3, 5, 17]",
    "experts": 'target_parameters = ["mlp.experts.',
}


@pytest.mark.parametrize("flavour", VLLM)
def test_what_vllm_cannot_load_is_said_before_it_starts(
    flavour: str, bases: Path, tmp_path: Path
) -> None:
    name, settings = FLAVOURS[flavour]
    train(bases / name, lora(settings), tmp_path / "adapter")
    obstacle = VLLM[flavour]
    if obstacle is None:
        check_vllm_loads(tmp_path / "adapter")
        return
    with pytest.raises(ValueError, match="which vLLM does not load; needs") as refused:
        check_vllm_loads(tmp_path / "adapter")
    assert f"adapter has {obstacle}" in str(refused.value)


def test_weights_of_the_base_that_vllm_leaves_out(bases: Path, tmp_path: Path) -> None:
    train(bases / "untied", lora({}), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    embeddings = load_file(bases / "untied/model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(file) | {name: embeddings + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has weights of the base itself in the adapter's file"):
        check_vllm_loads(tmp_path / "adapter")
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    stored = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], embeddings + 1)


def test_the_largest_rank_of_a_pattern_is_reserved(bases: Path, tmp_path: Path) -> None:
    train(bases / "tied", lora(FLAVOURS["patterns"][1]), tmp_path / "adapter")
    assert largest_rank(read_adapter_config(tmp_path / "adapter")) == 6
