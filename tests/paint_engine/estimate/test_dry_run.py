"""The report of a dry run: from a config.json alone, with no weights anywhere."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from paint_engine.config.command_line import load_config
from paint_engine.config.schema import Config
from paint_engine.data.problem_sets import ProblemSet, batch_indices, load_train_set
from paint_engine.estimate.arithmetic import Scoring
from paint_engine.estimate.dry_run import _server_lines, _teacher_lines, check_run_fits, describe
from paint_engine.estimate.lengths import prompt_lengths
from paint_engine.estimate.memory import estimate_memory
from paint_engine.estimate.model_shape import shape_of
from paint_engine.model.load import meta_model
from paint_engine.recipes import recipe_of

CPU = torch.device("cpu")
# Of the published checkpoints, as the hub counts them.
PUBLISHED = {
    "1.7b": (2048, 28, 16, 6144, True, 1_720_574_976),
    "4b": (2560, 36, 32, 9728, True, 4_022_468_096),
    "8b": (4096, 36, 32, 12288, False, 8_190_735_360),
}


def write_config(directory: Path, name: str) -> None:
    hidden, layers, heads, intermediate, tied, _ = PUBLISHED[name]
    Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    ).save_pretrained(directory)


def config_of(directory: Path, *options: str) -> Config:
    fixed = ("--preset", "paint-qwen3-8b", "--data.path", "tiny", "--rollout.engine", "vllm")
    named = ("--model.name_or_path", str(directory), "--eval.enabled", "false")
    return load_config([*fixed, *named, "--data.max_rows", "300", *options]).config


def train_set_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> ProblemSet:
    return load_train_set(config, tokenizer, 40960, lambda _: None)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_sizes_of_published_models_follow_from_their_configuration(
    name: str, tmp_path: Path
) -> None:
    write_config(tmp_path, name)
    model = meta_model(config_of(tmp_path))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shape = shape_of(model)
    assert shape.base_parameters == PUBLISHED[name][-1]
    whole = shape_of(meta_model(config_of(tmp_path, "--lora.enabled", "false")))
    assert whole.trained_parameters == whole.base_parameters == shape.base_parameters
    # Rank 64 on seven matrices a layer: r (inputs + outputs) each.
    hidden, layers, heads, intermediate, _, _ = PUBLISHED[name]
    queries, keys = 128 * heads, 128 * 8
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    assert shape.adapter_parameters == layers * 64 * (attention + 3 * (hidden + intermediate))


def test_the_report_shows_the_settings_the_first_batch_and_the_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "8b")
    config = config_of(tmp_path, "--parallel.device_memory_gb", "80")
    train_set, model = train_set_of(config, tokenizer), meta_model(config)
    report = describe(config, tokenizer, train_set, None, model, device=CPU, num_ranks=8)
    assert 'placement = "suffix"' in report
    assert "# 300 training problems, 0 held-out problems" in report
    assert "# 8,365,323,264 parameters, 174,587,904 trainable (2.1%)" in report
    assert "at most 32,768 completion tokens" in report
    first = batch_indices(300, config.train.batch_size, config.train.seed, 0)[0]
    assert f"student's prompt of {train_set.problems[first].problem_id} (" in report
    prompt = str(tokenizer.decode(list(train_set.prompts[first])))
    assert textwrap.indent(prompt, "| ", lambda line: True) in report
    assert report.count("<|im_start|>assistant") == 2
    assert "...(omitted)..." in report
    assert "# 31 more rollouts in the first step" in report
    assert "TFLOP" in report
    assert "each of 8 processes takes on a GPU" in report
    for part in ("frozen base", "optimizer", "vLLM", "CUDA context", "NCCL", "<- peak"):
        assert part in report
    assert "activation checkpointing" in report.rpartition("# memory")[2]


def test_a_run_without_room_is_reported_in_full_and_then_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "8b")
    config = config_of(tmp_path, "--parallel.device_memory_gb", "24")
    train_set, model = train_set_of(config, tokenizer), meta_model(config)
    report = describe(config, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
    assert "of 24.0" in report
    with pytest.raises(ValueError, match=r"of each GPU at its peak .* a GPU has 24\.0 GiB"):
        check_run_fits(config, tokenizer, train_set, model, device=CPU, num_ranks=1)


def test_on_a_cpu_there_is_no_gpu_s_share(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    config = config_of(tmp_path)
    train_set, model = train_set_of(config, tokenizer), meta_model(config)
    report = describe(config, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
    assert "# memory that 1 process takes on a CPU, in GiB" in report
    assert "CUDA context" not in report
    check_run_fits(config, tokenizer, train_set, model, device=CPU, num_ranks=1)


def test_prompts_are_measured_over_the_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    config = config_of(tmp_path)
    train_set = train_set_of(config, tokenizer)
    lengths = prompt_lengths(config, tokenizer, train_set, 40960)
    assert list(lengths.student) == [len(prompt) for prompt in train_set.prompts]
    assert len(lengths.teacher) == 150
    assert lengths.longest(10).student_prompt == max(lengths.student)
    assert lengths.typical(10).teacher_prompt == round(sum(lengths.teacher) / 150)
    tight = 10 + config.rollout.max_new_tokens + min(lengths.teacher)
    assert max(prompt_lengths(config, tokenizer, train_set, tight).teacher) <= tight - 1024


def test_a_rationale_is_shown_measured_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    options = "--teacher.reason_first", "true", "--teacher.reason_max_new_tokens", "100"
    plain, reasons = config_of(tmp_path), config_of(tmp_path, *options)
    train_set, model = train_set_of(plain, tokenizer), meta_model(plain)
    before, after = (prompt_lengths(c, tokenizer, train_set, 40960) for c in (plain, reasons))
    assert min(a - b for a, b in zip(after.teacher, before.teacher, strict=True)) > 100
    assert max(prompt_lengths(reasons, tokenizer, train_set, 1424).teacher) == 400
    report = describe(reasons, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
    assert "what the teacher writes of the text" in report


def test_rollouts_of_one_problem_and_what_is_not_sampled(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    options = ("--objective.name", "grpo", "--grpo.kl_weight", "0.1"), ("--objective.name", "sft")
    once, sft = (config_of(tmp_path, *o, "--train.batch_size", "32") for o in options)
    train_set, model = train_set_of(once, tokenizer), meta_model(once)
    report = describe(once, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
    assert "# 31 more rollouts in the first step, 8 of each problem, with" in report
    # Nothing is sampled, by vLLM or otherwise, where nothing is evaluated.
    on_gpu = [c.parallel.model_copy(update={"device_memory_gb": 80.0}) for c in (once, sft)]
    reports = [
        describe(
            config.model_copy(update={"parallel": parallel}),
            tokenizer,
            train_set,
            None,
            model,
            device=CPU,
            num_ranks=1,
        )
        for config, parallel in zip((once, sft), on_gpu, strict=True)
    ]
    assert [" vLLM" in text.rpartition("# memory")[2] for text in reports] == [True, False]


def test_what_the_sums_leave_out_is_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    plain = config_of(tmp_path)
    config = config_of(tmp_path, "--objective.on", "wrong", "--teacher.refresh_every", "5")
    train_set, model = train_set_of(plain, tokenizer), meta_model(plain)
    left_out = "# the sums have every rollout; each one that is left out of the passes takes "
    copied = f"# every 5 steps the teacher becomes a copy of the student's {69_730_304:,} trained"
    for given, expected in ((plain, False), (config, True)):
        report = describe(given, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
        assert (left_out in report) == (copied in report) == expected
    (total,) = re.findall(r"# a step: ([\d.]+) TFLOP \(rollout ([\d.]+)", report)
    (one,) = re.findall(rf"{left_out}([\d.]+) TFLOP less", report)
    passes = float(total[0]) - float(total[1])
    assert float(one) * config.train.batch_size == pytest.approx(passes, rel=0.02)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", False),
        ("--objective.on wrong", True),
        ("--teacher.context sibling", True),
        ("--teacher.context feedback --data.columns.feedback hint", True),
        ("--objective.name grpo", True),
        ("--objective.name grpo --grpo.skip_zero_variance false", False),
        ("--objective.name grpo --grpo.kl_weight 0.04", False),
        ("--objective.name grpo --grpo.advantage negative", False),
        ("--objective.name grpo_paint", False),
        ("--objective.name grpo_paint --grpo.skip_zero_variance false --objective.on wrong", False),
        ("--objective.name grpo_paint --objective.on wrong", True),
    ],
)
def test_a_recipe_says_whether_it_leaves_rollouts_out(options: str, expected: bool) -> None:
    config = load_config(options.split()).config
    assert recipe_of(config).leaves_out == expected


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, "it scores 1,024 of a step's 1,024 rollouts, 122,880 tokens"),
        ({"objective": {"on": "wrong"}}, "it scores at most 1,024 of a step's 1,024 rollouts"),
        ({"teacher": {"context": "sibling"}}, "it scores at most 1,024 of a step's 1,024"),
    ],
)
def test_a_teacher_s_rollouts_are_an_upper_bound_where_some_are_left_out(
    sections: dict[str, dict[str, str]], line: str
) -> None:
    teacher = {"weights": "external", "models": ["t"], **sections.get("teacher", {})}
    config = Config.model_validate({**sections, "teacher": teacher, "train": {"batch_size": 1024}})
    with torch.device("meta"):
        shape = shape_of(Qwen3ForCausalLM(Qwen3Config(vocab_size=8, num_hidden_layers=1)))
    (found,) = _teacher_lines(config, 100, [Scoring(shape, 20.0)])
    assert line in found
    (found,) = _teacher_lines(config, 100, [Scoring(shape, 20.0, share=2 / 700)])
    assert "2.93 of a step's 1,024" in found


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            "--rollout.url http://a:1,http://b:1,http://c:1",
            [
                "# 3 servers sample about 341.33 of a step's 1,024 rollouts each (not asked now): "
                "http://a:1, http://b:1, http://c:1"
            ],
        ),
        ("--rollout.url http://a:1", []),
        ("", []),
        ("--rollout.url http://a:1,http://b:1 --objective.name sft --eval.enabled false", []),
    ],
)
def test_servers_share_a_step(options: str, lines: list[str]) -> None:
    fixed = ("--rollout.engine", "vllm", "--train.batch_size", "1024")
    assert _server_lines(load_config([*fixed, *options.split()]).config) == lines


def test_memory_is_of_the_roles_and_the_sampling_that_a_run_has(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_config(tmp_path, "1.7b")
    sft, grpo = ("--objective.name", "sft"), ("--objective.name", "grpo")
    cases = (), sft, (*sft, "--eval.enabled", "true"), grpo, (*grpo, "--grpo.kl_weight", "0.1")
    builtin = "--rollout.engine", "builtin"
    configs = [config_of(tmp_path, *builtin, *options) for options in cases]
    train_set, model = train_set_of(configs[0], tokenizer), meta_model(configs[0])
    reports = [
        describe(config, tokenizer, train_set, None, model, device=CPU, num_ranks=1)
        for config in configs
    ]
    memory = [report.rpartition("# memory")[2] for report in reports]
    assert ["while: sampling" in text for text in memory] == [True, False, False, True, True]
    assert ["while: evaluation" in text for text in memory] == [False, False, True, False, False]
    both = ["hidden states of both roles" in text for text in memory]
    assert both == [True, False, False, False, True]
    assert ["hidden states of the student" in text for text in memory] == [not b for b in both]
    # In float32 on a CPU: a number a role.
    lengths = prompt_lengths(configs[0], tokenizer, train_set, 40960).longest(1024)
    sizes = [
        part
        for config in configs
        for name, part in estimate_memory(
            shape_of(model), config=config, lengths=lengths, num_ranks=1, device_memory_bytes=None
        )
        .phases["the loss"]
        .items()
        if name.startswith("hidden states")
    ]
    assert [size / sizes[1] for size in sizes] == [2, 1, 1, 1, 2]


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the model's config\.json"):
        meta_model(config_of(tmp_path))
