"""The sections of a run's configuration: every key with its default (the paper's), its valid values
and its help text.

Modules that receive a section need not check it. Checks across sections: `schema.py`.
"""

import datetime
import re
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import PydanticCustomError

from paint_engine.config import templates
from paint_engine.config.benchmarks import (
    Benchmark,
    benchmark_name,
    find_benchmarks,
    split_entries,
)
from paint_engine.files import path_text
from paint_engine.keys import SERVER_KEY

T = TypeVar("T")

HIDDEN = "hidden"
"""the type of pydantic's error for a value that messages must not show"""
# Of the domain name system.
_MAX_HOST_BYTES = 253
_MAX_SERVERS = 64
# As huggingface_hub checks it, with the owner.
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?=.{{3,96}}\Z){_PART}/{_PART}", re.ASCII)
ALL_LINEAR = "all-linear"
"""in place of names: every linear layer of the text decoder, as in peft"""


def _is_date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError("a date as YYYY-MM-DD, such as 2026-01-31") from error


def _is_server_url(text: str) -> str:
    if any(mark in text for mark in "@?#"):
        # The value is not shown: it may have a password in it.
        raise PydanticCustomError(
            HIDDEN,
            "an address without user, password, query or fragment, such as http://node7:8000; a "
            f"server's key goes into the environment variable {SERVER_KEY}",
        )
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        whole = parts.scheme in ("http", "https") and len(host) > 0 and parts.port != 0
        # As the lookup of the name will: each part has 1 to 63 characters. An address of IPv6 has
        # no parts.
        whole = whole and len(host.encode("idna")) <= _MAX_HOST_BYTES
    except ValueError:
        whole = False
    # urlsplit drops line breaks and tabs.
    if not whole or not all("!" <= char <= "~" for char in text):
        raise ValueError(
            "a server's address, such as http://node7:8000, whose host name has 1 to 63 characters "
            f"between its dots and at most {_MAX_HOST_BYTES} in all"
        )
    return text


def _is_repository(text: str) -> str:
    if not _REPOSITORY.fullmatch(text) or "--" in text or ".." in text or text.endswith(".git"):
        raise ValueError(
            "a repository of the Hugging Face Hub as user/name, each part of letters, digits, "
            "'-', '_' and '.', and at most 96 characters in all"
        )
    return text


def _top_k_is_on_or_off(top_k: int) -> int:
    if top_k < 1 and top_k != -1:
        raise ValueError("-1 (all tokens) or a count of at least 1")
    return top_k


def _one_word_is_a_list(value: object) -> object:
    return (value,) if value == ALL_LINEAR else value


def _all_is_alone(names: tuple[str, ...]) -> tuple[str, ...]:
    if ALL_LINEAR in names and len(names) > 1:
        raise ValueError(f"names of layers, or {ALL_LINEAR!r} alone")
    return names


def _words_are_a_list(value: object) -> object:
    # As `--benchmarks` of the evaluation command takes them: separated by commas.
    if not isinstance(value, str):
        return value
    return [] if value.lower() == "none" else split_entries(value)


def _servers_differ(urls: tuple[str, ...]) -> tuple[str, ...]:
    # As requests go there: host and scheme have no case, and a slash at the end no meaning.
    places = [urlsplit(url)._replace(netloc=urlsplit(url).netloc.lower()).geturl() for url in urls]
    if not 1 <= len({place.rstrip("/") for place in places}) == len(urls) <= _MAX_SERVERS:
        raise ValueError(f"1 to {_MAX_SERVERS} addresses, each of another server")
    return urls


def _are_benchmarks(entries: tuple[str, ...]) -> tuple[str, ...]:
    find_benchmarks(entries, "benchmarks")
    return entries


# TOML has no null: "none" stands for it, in files and on the command line.
OrNone = Annotated[
    T | None,
    BeforeValidator(lambda v: None if isinstance(v, str) and v.lower() == "none" else v),
]
# The bounds are far above what any run uses. They keep a slip, or a file made to harm, from sizing
# a list, a loop or a time that no machine has.
Steps = Annotated[int, Field(gt=0, le=10**9)]
Interval = Annotated[int, Field(ge=0, le=10**9)]
Tokens = Annotated[int, Field(gt=0, le=10**9)]
Rows = Annotated[int, Field(gt=0, le=10**9)]
Rollouts = Annotated[int, Field(gt=0, le=10**6)]
NoneOrMore = Annotated[int, Field(ge=0, le=10**6)]
Samples = Annotated[int, Field(gt=0, le=10**5)]
Rank = Annotated[int, Field(gt=0, le=10**6)]
Gpus = Annotated[int, Field(gt=0, le=10**4)]
# NumPy's generator takes no larger one.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# A third of the largest number of float32, in which they are used.
Positive = Annotated[float, Field(gt=0, le=1e38)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]
# The system counts a wait in milliseconds, in 32 bits.
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Gibibytes = Annotated[float, Field(gt=0, le=1e9)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(le=10**9), AfterValidator(_top_k_is_on_or_off)]
TopP = Annotated[float, Field(gt=0, le=1)]
Date = Annotated[str, AfterValidator(_is_date)]
Decay = Annotated[float, Field(ge=0, lt=1)]
GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h200", "l40s", "rtx-4090"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
# Of a file or a directory; or what a hub or an import looks up as one.
PathText = Annotated[Text, AfterValidator(path_text)]
# Strict mode refuses the list that TOML gives for a tuple.
TextTuple = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
# Any of them may be absent; few are ever used.
PathTuple = Annotated[tuple[PathText, ...], Field(strict=False, max_length=64)]
NameTuple = Annotated[tuple[Text, ...], Field(strict=False, max_length=64)]
WeightTuple = Annotated[tuple[Positive, ...], Field(strict=False, max_length=64)]
LayerNames = Annotated[
    TextTuple, BeforeValidator(_one_word_is_a_list), AfterValidator(_all_is_alone)
]

Repository = Annotated[Text, AfterValidator(_is_repository)]
ServerUrl = Annotated[Text, AfterValidator(_is_server_url)]
# Only the check after those of each address counts them: its message shows all of them.
ServerUrls = Annotated[
    tuple[ServerUrl, ...],
    Field(strict=False),
    BeforeValidator(_words_are_a_list),
    AfterValidator(_servers_differ),
]
Benchmarks = Annotated[
    PathTuple, BeforeValidator(_words_are_a_list), AfterValidator(_are_benchmarks)
]

BESIDE_RUN = "auto"
"""of `eval.base_cache`: a directory beside that of the run"""
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class Section(BaseModel):
    """Base class of the sections. Values are not converted: "40" is not a number of steps."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        # `toml.py` shows those that may be shown.
        hide_input_in_errors=True,
    )


class ModelSection(Section):
    name_or_path: PathText = Field(
        default="tiny",
        description="'tiny' or 'tiny-teacher' (bundled), a model directory or a Hugging Face id",
    )
    revision: OrNone[PathText] = Field(
        default=None, description="commit, tag or branch of a Hugging Face id; none = the newest"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="dtype of frozen weights and of the arithmetic: auto = bfloat16 on a GPU that "
        "supports it, else float32; trained weights are always float32",
    )
    attention: Literal["auto", "padded", "packed", "varlen", "flash_attention_2"] = Field(
        default="auto",
        description="of the loss: padded rows, or packed sequences with a dense mask "
        "(packed), PyTorch's varlen or flash-attn; auto: varlen on a GPU in bfloat16, else padded",
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model"
    )


class LoraSection(Section):
    enabled: bool = Field(default=True, description="train adapters; false trains all weights")
    rank: Rank = Field(default=64, description="rank r of the adapters")
    alpha: Rank = Field(default=128, description="adapters are scaled by alpha / rank")
    dropout: Decay = Field(default=0.0, description="dropout probability on the adapters' input")
    target_modules: LayerNames = Field(
        default=(ALL_LINEAR,),
        description="names of the linear layers that get adapters; all-linear = all of the text "
        "decoder, without the output head",
    )


class ColumnsSection(Section):
    problem: OrNone[Text] = Field(default=None, description="column of the question; none = detect")
    solution: OrNone[Text] = Field(
        default=None, description="column of the solution; none = detect"
    )
    answer: OrNone[Text] = Field(
        default=None, description="column of the final answer; none = detect"
    )


class DataColumnsSection(ColumnsSection):
    feedback: OrNone[Text] = Field(
        default=None,
        description="column of a text that teacher.context feedback shows where the reward "
        "function returns none; none = no column",
    )


class DataSection(Section):
    path: PathText = Field(
        default="tiny",
        description="'tiny', a .jsonl/.json/.parquet file, or a datasets id[:config]",
    )
    revision: OrNone[PathText] = Field(
        default=None, description="commit, tag or branch of a datasets id; none = the newest"
    )
    split: PathText = Field(default="train", description="split of 'tiny' or of a datasets id")
    columns: DataColumnsSection = Field(
        default=DataColumnsSection(), description="names of columns that are not detected"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="at an unusable row, stop, or skip and count it; in evaluation data too",
    )
    max_rows: OrNone[Rows] = Field(
        default=None, description="number of problems used, from the first; none = all"
    )
    max_prompt_tokens: OrNone[Tokens] = Field(
        default=None,
        description="drop problems with a longer student prompt, in tokens; none = drop none",
    )


class PromptsSection(Section):
    student_thinking: bool = Field(
        default=False, description="chat template's thinking switch for the student"
    )
    teacher_thinking: bool = Field(
        default=False, description="chat template's thinking switch for the teacher"
    )
    instruction: str = Field(
        default=INSTRUCTION,
        description="value of {instruction} in templates: closing line of both prompts",
    )
    student_template: templates.Student = Field(
        default=templates.STUDENT,
        description="the student's message, also in evaluation: {problem}, {instruction}",
    )
    teacher_template: templates.Teacher = Field(
        default=templates.TEACHER,
        description="the teacher's message, by default that of teacher.context: {problem}, "
        "{solution} (the shown text), {part_of} (if a part), {rationale}, {instruction}",
    )
    rationale_template: templates.Rationale = Field(
        default=templates.RATIONALE,
        description="section put in place of teacher_template's {rationale}, with reason_first",
    )
    reason_template: templates.Reason = Field(
        default=templates.REASON,
        description="message that asks for a rationale, with reason_first, by default that of "
        "teacher.context: {problem}, {solution}, {part_of}, {instruction}",
    )
    teacher_suffix: str = Field(
        default="", description="text appended to the teacher's generation prompt"
    )
    date: OrNone[Date] = Field(
        default=None,
        description="date that a chat template which asks for it shows, YYYY-MM-DD; none = the day "
        "on which the run starts",
    )


class MaskingSection(Section):
    rho_wrong: UnitInterval = Field(
        default=0.30, description="hidden fraction at overlap 0 (Eq. 5)"
    )
    rho_correct: UnitInterval = Field(
        default=0.40, description="hidden fraction at overlap 1 (Eq. 5)"
    )
    placement: Literal["suffix", "prefix", "middle", "random", "sentence_suffix"] = Field(
        default="suffix", description="which part of the solution is hidden"
    )
    marker: str = Field(default="...(omitted)...", description="text in place of the hidden part")


class RolloutSection(Section):
    temperature: Positive = Field(default=1.1, description="sampling temperature")
    top_p: TopP = Field(default=0.95, description="nucleus mass")
    top_k: TopK = Field(default=20, description="most likely tokens kept; -1 = all")
    max_new_tokens: Tokens = Field(
        default=1024, description="maximum length of a completion, in tokens"
    )
    max_sequences: Rollouts = Field(default=64, description="sequences decoded at once")
    engine: Literal["auto", "vllm", "builtin"] = Field(
        default="auto",
        description="sampler in training and evaluation: auto = vLLM if it is installed or "
        "rollout.url is given, else the built-in one",
    )
    url: OrNone[ServerUrls] = Field(
        default=None,
        description="vLLM servers with the OpenAI API, one or several, such as "
        "http://node7:8000,http://node8:8000; none = vLLM in this process",
    )
    ahead: Annotated[int, Field(ge=0, le=1)] = Field(
        default=0,
        description="1 = sample the next batch while this one trains, from weights one step old",
    )
    gpu_memory_utilization: Fraction = Field(
        default=0.35, description="share of GPU memory for vLLM in this process"
    )
    tensor_parallel_size: Gpus = Field(
        default=1, description="GPUs per vLLM engine in these processes"
    )
    adapter_dir: OrNone[PathText] = Field(
        default=None,
        description="directory through which vLLM receives the adapters; none = shared memory; a "
        "server on another node must see it too",
    )


class TeacherSection(Section):
    context: PathText = Field(
        default="solution",
        description="what the teacher is shown: solution, none, other (problem's solution), "
        "sibling = a correct rollout of the group, feedback, answer, or module:Class",
    )
    group_size: Annotated[Rollouts, Field(ge=2)] = Field(
        default=8,
        description="with context sibling, rollouts of one problem; train.batch_size counts "
        "rollouts",
    )
    weights: Literal["fixed", "ema", "live", "external"] = Field(
        default="fixed",
        description="the teacher's weights: fixed = the base (adapters off), ema = a running mean "
        "of the student's, live = the student's at each step, external = another model's",
    )
    model: OrNone[PathText] = Field(
        default=None,
        description="with external, the model with the student's vocabulary: a directory, a "
        "Hugging Face id, or 'tiny-teacher' or 'tiny' (bundled)",
    )
    revision: OrNone[PathText] = Field(
        default=None,
        description="commit, tag or branch of teacher.model, if that is an id; none = the newest",
    )
    models: PathTuple = Field(
        default=(), description="with external, several models in place of teacher.model"
    )
    model_weights: WeightTuple = Field(
        default=(),
        description="weights of teacher.models in the loss, divided by their sum; [] = equal",
    )
    route_column: OrNone[Text] = Field(
        default=None,
        description="column of the data that names the one of teacher.models that scores a "
        "problem's rollouts; none = all of them do",
    )
    model_names: NameTuple = Field(
        default=(),
        description="names of teacher.models in that column; [] = as written in teacher.models",
    )
    refresh_every: OrNone[Steps] = Field(
        default=None,
        description="with fixed, steps after which the teacher becomes the student of that step; "
        "none = it stays the base",
    )
    ema_decay: Decay = Field(
        default=0.999, description="with ema, share of the old mean that each step keeps"
    )
    reason_first: bool = Field(
        default=False,
        description="the teacher first writes a rationale from the shown solution, which is then "
        "part of its prompt",
    )
    reason_max_new_tokens: Tokens = Field(
        default=512, description="maximum length of a rationale, in tokens"
    )
    url: OrNone[ServerUrl] = Field(
        default=None,
        description="a vLLM server that scores the student's tokens, such as http://node7:8000; "
        "none = the teacher of teacher.weights, in this process",
    )
    served_model: OrNone[PathText] = Field(
        default=None,
        description="with a server, the model that it must serve; none = what it serves when the "
        "run starts, which is recorded here",
    )
    served_top_k: Tokens = Field(
        default=64,
        description="with a server, likeliest tokens that it lists at each position; at most its "
        "--max-logprobs",
    )
    tail: Literal["bucket", "renormalise", "drop"] = Field(
        default="bucket",
        description="with a server, the tokens that it does not list: bucket = one entry with the "
        "probability of all, renormalise = none, drop = left out of the sum",
    )


class ObjectiveSection(Section):
    name: PathText = Field(
        default="paint",
        description="the recipe: paint (and OPSD), sampled_token = policy gradient by "
        "log p_T - log p_S, grpo, grpo_paint, sft = on the solutions; or module:Class of your "
        "own",
    )
    on: Literal["all", "wrong", "right"] = Field(
        default="all",
        description="rollouts that the teacher trains: all, or those that the reward function "
        "judges wrong, or right",
    )
    token_weights: PathText = Field(
        default="uniform",
        description="weights of a rollout's tokens in the divergence: uniform, entropy = by the "
        "student's entropy, position = later tokens more; or module:function of your own",
    )
    distill_weight: NonNegative = Field(
        default=1.0, description="in grpo_paint, weight of the divergence beside GRPO's loss"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl",
        description="KL(teacher, student), KL(student, teacher), or the generalised "
        "Jensen-Shannon divergence",
    )
    jsd_weight: Fraction = Field(
        default=0.5, description="the teacher's weight in the mixture of jsd"
    )
    pointwise_clip: OrNone[Positive] = Field(
        default=0.06,
        description="tau: upper bound of each vocabulary entry's KL term, in nats (Eq. 3)",
    )
    top_fraction: UnitInterval = Field(
        default=0.03,
        description="f: fraction of a rollout's tokens whose target is interpolated (Eq. 12)",
    )
    interpolation_weight: UnitInterval = Field(
        default=0.03, description="k: weight of the student's logits in those targets (Eq. 12)"
    )
    temperature: Positive = Field(
        default=1.1,
        description="divides both roles' logits in the loss; does not follow rollout.temperature, "
        "unlike in OPSD's code",
    )
    reduction: Literal["sequence_mean", "token_mean"] = Field(
        default="sequence_mean", description="mean over rollouts of token means, or over all tokens"
    )
    entropy_floor: Positive = Field(
        default=1e-6,
        description="lower bound of the student's entropy in the ratio, in nats (Eq. 9)",
    )
    teacher_top_k: OrNone[Tokens] = Field(
        default=None,
        description="restrict both roles to the teacher's k likeliest entries (none = all)",
    )
    importance_cap: OrNone[Positive] = Field(
        default=None,
        description="in sampled_token and GRPO's loss, weight tokens by min(p_trainer / p_sampler, "
        "this); none = no correction of the sampler's mismatch",
    )


class GrpoSection(Section):
    group_size: Annotated[Rollouts, Field(ge=2)] = Field(
        default=8, description="rollouts of one problem; train.batch_size counts rollouts"
    )
    advantage: Literal["group", "negative"] = Field(
        default="group",
        description="group = the reward beside those of its group; negative = a fixed one on each "
        "rollout's least likely tokens, whatever the rewards: a control without a teacher",
    )
    negative_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2,
        description="with advantage negative, share of a rollout's tokens that get it",
    )
    ratio_clip_low: Fraction = Field(
        default=0.2, description="the probability ratio is clipped below 1 - this"
    )
    ratio_clip_high: Positive = Field(
        default=0.28, description="the probability ratio is clipped above 1 + this"
    )
    kl_weight: NonNegative = Field(
        default=0.0, description="weight of the KL to the base, by the k3 estimate"
    )
    scale_by_std: bool = Field(
        default=True, description="divide a group's advantages by its rewards' standard deviation"
    )
    skip_zero_variance: bool = Field(
        default=True,
        description="leave out the passes of groups whose rewards are all equal, where their "
        "gradient is zero: without a KL or a teacher",
    )
    num_updates: Rollouts = Field(
        default=1, description="optimizer steps on each batch of rollouts"
    )


class RewardSection(Section):
    function: PathText = Field(
        default="math",
        description="judges a completion: math = the answer check, first_box = the first box as "
        "text (OPSD's), or module:function of (problem, completion text)",
    )
    timeout_s: Seconds = Field(
        default=5.0, description="time limit for judging one completion, in seconds"
    )


class OptimSection(Section):
    learning_rate: Positive = Field(default=5e-6, description="AdamW's peak learning rate")
    weight_decay: NonNegative = Field(default=0.0, description="AdamW's decoupled weight decay")
    beta1: Decay = Field(default=0.9, description="AdamW's decay of the first moment")
    beta2: Decay = Field(default=0.999, description="AdamW's decay of the second moment")
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon")
    max_grad_norm: Positive = Field(
        default=0.1, description="gradients are scaled down to at most this L2 norm"
    )
    max_skipped_steps: Steps = Field(
        default=3,
        description="an optimizer step is skipped if its gradient is NaN or infinite; so many in a "
        "row stop the run",
    )
    warmup_steps: Interval = Field(default=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="learning rate after the warm-up; linear and cosine end at 0",
    )


class TrainSection(Section):
    num_steps: Steps = Field(default=100, description="optimizer steps")
    batch_size: Rollouts = Field(default=32, description="rollouts per step")
    max_tokens_per_microbatch: Tokens = Field(
        default=16384, description="maximum tokens per forward pass, prompts included"
    )
    seed: Seed = Field(default=0, description="seed of data order, adapters and sampling")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto = a GPU if one is available"
    )


class ParallelSection(Section):
    shard: Literal["full", "replicate"] = Field(
        default="full",
        description="under torchrun: weights sharded over all ranks (FSDP2), or whole on each",
    )
    replicas: Gpus = Field(
        default=1,
        description="copies of the sharded weights (HSDP), each over as many consecutive ranks; "
        "with the number of nodes, weights are gathered within a node",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute each layer in the backward pass: slower, less memory"
    )
    device_memory_gb: OrNone[Gibibytes] = Field(
        default=None,
        description="memory of one GPU that the estimate must fit, in GiB (80 for an 80 GB GPU); "
        "none = that of this machine",
    )
    gpu: OrNone[GpuName] = Field(
        default=None,
        description="GPU for which --dry-run predicts hours; none = this machine's, if known",
    )


class EvalSection(Section):
    enabled: bool = Field(default=True, description="evaluate before, during and after training")
    path: PathText = Field(default="tiny", description="as data.path")
    revision: OrNone[PathText] = Field(default=None, description="as data.revision")
    split: PathText = Field(default="test", description="as data.split")
    benchmarks: Benchmarks = Field(
        default=(),
        description="benchmarks, as --benchmarks of paint_engine.evaluate takes them, in place of "
        "path, split and revision; empty = that of path",
    )
    columns: ColumnsSection = Field(default=ColumnsSection(), description="as data.columns")
    num_problems: OrNone[Rows] = Field(
        default=128, description="number of problems of each, from the first; none = all"
    )
    num_samples: Samples = Field(default=12, description="completions per problem: the k of Avg@k")
    temperature: Positive = Field(default=1.0, description="sampling temperature")
    top_p: TopP = Field(default=0.95, description="nucleus mass")
    top_k: TopK = Field(default=-1, description="most likely tokens kept; -1 = all")
    max_new_tokens: Tokens = Field(
        default=38912, description="maximum length of a completion, in tokens"
    )
    max_sequences: Rollouts = Field(
        default=64,
        description="sequences that the built-in sampler decodes at once; vLLM has "
        "rollout.max_sequences",
    )
    gpu_memory_utilization: OrNone[Fraction] = Field(
        default=None,
        description="share of GPU memory for vLLM of the evaluations' own, during which that of "
        "the rollouts ends; none = one engine for both",
    )
    max_concurrent: OrNone[Rollouts] = Field(
        default=None,
        description="sequences that this engine decodes at once; none = rollout.max_sequences",
    )
    thinking: bool = Field(
        default=True, description="chat template's thinking switch in evaluation"
    )
    prompt: Literal["student", "opsd"] = Field(
        default="student",
        description="message of an evaluation: the one that the student is trained with, or OPSD's "
        "without 'Problem: '",
    )
    every: Interval = Field(
        default=0, description="steps between evaluations; 0 = none during training"
    )
    at_start: bool = Field(default=True, description="evaluate before the first step")
    base_cache: OrNone[PathText] = Field(
        default=BESIDE_RUN,
        description="directory of the base's evaluations, which runs share; auto = "
        "base-evaluations beside the run directory; none = each run has its own",
    )
    sampling_seed: OrNone[Seed] = Field(
        default=None,
        description="seed of the answers; none = train.seed: runs of other seeds then share no "
        "evaluation of the base",
    )
    at_end: bool = Field(default=True, description="evaluate after the last step")
    final_num_samples: OrNone[Samples] = Field(
        default=None,
        description="num_samples of a second evaluation after training, of the base, the last and "
        "the best step; none = num_samples",
    )
    final_max_new_tokens: OrNone[Tokens] = Field(
        default=None, description="its max_new_tokens; none = max_new_tokens"
    )

    def is_evaluated(self, step: int, num_steps: int) -> bool:
        """Whether there is an evaluation after `step` of `num_steps` steps, from 1."""
        regular = self.every > 0 and step > 0 and step % self.every == 0
        return regular or (self.at_end and step == num_steps)

    @property
    def final(self) -> "EvalSection | None":
        """The section of the evaluation after training, by the full protocol; None if it would be
        the one that holds during training."""
        changed = {
            "num_samples": self.final_num_samples or self.num_samples,
            "max_new_tokens": self.final_max_new_tokens or self.max_new_tokens,
        }
        full = self.model_copy(update=changed)
        same = all(getattr(self, name) == value for name, value in changed.items())
        return None if same else full

    @property
    def longest_completion(self) -> int:
        """The largest limit on an answer, in tokens, during training and after it."""
        return max(self.max_new_tokens, self.final_max_new_tokens or 0)

    @property
    def sources(self) -> tuple[Benchmark, ...]:
        """What is evaluated on: `benchmarks`, else `path`."""
        if self.benchmarks:
            return tuple(find_benchmarks(self.benchmarks, "eval.benchmarks"))
        return (Benchmark(benchmark_name(self.path), self.path, self.split, self.revision),)


class CheckpointSection(Section):
    every: Interval = Field(
        default=20, description="steps between checkpoints; 0 = only after the last step"
    )
    keep: Steps = Field(
        default=2, description="newest checkpoints kept, in addition to the best evaluated one"
    )


class RunSection(Section):
    dir: OrNone[PathText] = Field(
        default=None, description="run directory; none = runs/<preset or name>-<UTC time>"
    )
    overwrite: bool = Field(default=False, description="replace an existing run directory")
    auto_resume: bool = Field(
        default=False,
        description="resume the run in run.dir if there is one, else start it: for requeued jobs",
    )
    samples_per_step: NoneOrMore = Field(
        default=2, description="rollouts per step kept for the report"
    )
    samples_per_evaluation: NoneOrMore = Field(
        default=8,
        description="answers of each benchmark's evaluation that TensorBoard and W&B show, one of "
        "each of the first problems; 0 = none",
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files")
    wandb_project: OrNone[PathText] = Field(
        default=None, description="also log to this Weights & Biases project"
    )
    push_to_hub: OrNone[Repository] = Field(
        default=None,
        description="push the adapter at the end to this repository of the Hugging Face Hub, as "
        "user/name; a new one is private; none = do not",
    )
