"""External teachers before a run: their tokens against the student's, their logits, their files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from paint_engine.config.schema import Config
from paint_engine.config.toml import build_config
from paint_engine.distributed import World
from paint_engine.model.forward import hidden_states, lm_head_weight
from paint_engine.model.packing import build_batch
from paint_engine.model.teachers import Panel
from paint_engine.model.teachers.external import (
    OpenedTeacher,
    check_teachers_stored,
    load_teachers,
    open_teachers,
)
from paint_engine.types import TrainExample

WORLD = World(0, 1, 0, torch.device("cpu"))


def config_of(model_dir: Path, *teachers: Path, **settings: Any) -> Config:
    layer = {
        "model.name_or_path": str(model_dir),
        "model.dtype": "float32",
        "teacher.weights": "external",
        "teacher.models": [str(teacher) for teacher in teachers],
    }
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return build_config([("test", layer | changed)])


def opened(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, *teachers: Path, **settings: Any
) -> tuple[OpenedTeacher, ...]:
    config = config_of(model_dir, *teachers, **settings)
    return open_teachers(config, tokenizer, pytest.fail)


def refusal(tokenizer: PreTrainedTokenizerBase, model_dir: Path, teacher: Path) -> str:
    with pytest.raises(ValueError) as caught:
        opened(tokenizer, model_dir, teacher)
    return str(caught.value)


@pytest.fixture
def copy(teacher_dirs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher_dirs[0], tmp_path / "teacher"))


def change_tokens(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_teachers_are_other_models_with_their_own_prompts_and_contexts(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, teacher_dirs: tuple[Path, Path]
) -> None:
    weights = {"teacher__model_weights": [1, 3]}
    first, second = opened(tokenizer, model_dir, *teacher_dirs, **weights)
    assert (first.reader.max_context, second.reader.max_context) == (1024, 512)
    assert first.tokenizer.chat_template == tokenizer.chat_template
    assert second.tokenizer.chat_template != tokenizer.chat_template
    assert (first.given.weight, second.given.weight) == (0.25, 0.75)
    assert {p.device.type for p in first.shape.parameters()} == {"meta"}


def test_the_loaded_teacher_scores_with_its_own_width_and_head(
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    teacher_dirs: tuple[Path, Path],
    ragged: list[TrainExample],
    naive_logits: Callable[..., torch.Tensor],
) -> None:
    config = config_of(model_dir, *teacher_dirs)
    panel = Panel(load_teachers(config, opened(tokenizer, model_dir, *teacher_dirs), WORLD, print))
    widths = []
    for member, directory in zip(panel.members, teacher_dirs, strict=True):
        assert member.attention == "padded" and member.weight == 0.5
        with member.scoring() as scorer:
            assert not any(p.requires_grad for p in scorer.parameters())
            states = hidden_states(scorer, build_batch(ragged).teacher, attention="padded")
            logits = states @ lm_head_weight(scorer).T
        widths.append(states.shape[1])
        model = AutoModelForCausalLM.from_pretrained(directory)
        rows = []
        for item in ragged:
            assert item.teacher_view is not None
            prompt = item.teacher_view.prompt_ids
            with torch.no_grad():
                alone = naive_logits(model, prompt + item.rollout.completion_ids)
            rows.append(alone[len(prompt) - 1 : -1])
        torch.testing.assert_close(logits, torch.cat(rows), rtol=1e-4, atol=1e-4)
    assert widths == [48, 24]


def test_a_single_differing_token_is_refused_with_the_token(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, copy: Path
) -> None:
    spelled = tokenizer.convert_ids_to_tokens(200)

    def respell(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        del vocab[spelled]
        vocab["\u0120other"] = 200
        content["model"]["merges"] = []

    change_tokens(copy, respell)
    message = refusal(tokenizer, model_dir, copy)
    assert message == (
        f"teacher {copy}: token id 200 is '\u0120other', and it is {spelled!r} for the student "
        f"{model_dir}; needs the same token for every id of the student, because the loss compares "
        "the two vocabularies entry by entry; use a teacher with the student's tokenizer, such as "
        "a larger model of its family"
    )


def test_special_tokens_count(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, copy: Path
) -> None:
    (stop,) = tokenizer.encode("<|im_end|>")

    def respell(content: dict[str, Any]) -> None:
        (token,) = (one for one in content["added_tokens"] if one["id"] == stop)
        token["content"] = "<|end|>"
        if "<|im_end|>" in content["model"]["vocab"]:
            content["model"]["vocab"]["<|end|>"] = content["model"]["vocab"].pop("<|im_end|>")

    change_tokens(copy, respell)
    settings = copy / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "<|end|>"))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|end|>"))
    message = refusal(tokenizer, model_dir, copy)
    assert f"token id {stop} is '<|end|>', and it is '<|im_end|>' for the student" in message


def test_tokens_that_the_student_lacks_are_left_out_with_a_note(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, copy: Path
) -> None:
    def add(content: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": len(tokenizer), "content": "<|more|>", "special": True, **flags}
        content["added_tokens"].append(token)

    change_tokens(copy, add)
    said: list[str] = []
    open_teachers(config_of(model_dir, copy), tokenizer, said.append)
    (note,) = said
    assert note.startswith(f"note: teacher {copy} has 1 tokens more than the student; the loss")
    # The other way round, the teacher lacks a token.
    (teacher,) = open_teachers(config_of(model_dir, copy), tokenizer, print)
    with pytest.raises(ValueError, match=rf"token id {len(tokenizer)} is no token, and it is '<"):
        opened(teacher.tokenizer, copy, model_dir)


@pytest.mark.parametrize("missing", ["directory", "weights"])
def test_messages_name_the_teacher_and_its_keys(
    missing: str, tokenizer: PreTrainedTokenizerBase, model_dir: Path, copy: Path
) -> None:
    if missing == "directory":
        message = refusal(tokenizer, model_dir, copy / "nowhere")
        assert message.startswith(f"teacher {copy / 'nowhere'}: model")
    else:
        (copy / "model.safetensors").unlink()
        teachers = opened(tokenizer, model_dir, copy)
        with pytest.raises(ValueError) as caught:
            check_teachers_stored(teachers, print)
        message = str(caught.value)
        assert "has no weights in safetensors files" in message
    assert "--teacher.model" in message and "--model.name_or_path" not in message


def test_weights_that_do_not_fill_a_teacher_are_refused(
    tokenizer: PreTrainedTokenizerBase, model_dir: Path, copy: Path
) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 52'))
    teachers = opened(tokenizer, model_dir, copy)
    with pytest.raises(ValueError, match=f"^teacher {copy}: model .* stored tensors of another"):
        check_teachers_stored(teachers, print)
    with pytest.raises(ValueError, match=f"^teacher {copy}: model .* stored tensors of another"):
        load_teachers(config_of(model_dir, copy), teachers, WORLD, print)


@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_a_cap_is_refused_and_a_scale_is_computed(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    tmp_path: Path,
    small_model: Callable[..., PreTrainedModel],
    ragged: list[TrainExample],
) -> None:
    settings = {"Gemma2": {"final_logit_softcapping": 5.0}, "Granite": {"logits_scaling": 4.0}}
    model = small_model(name, vocab_size=350, **settings[name])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if name == "Gemma2":
        assert "probably by a cap" in refusal(tokenizer, model_dir, tmp_path)
        return
    teachers = opened(tokenizer, model_dir, tmp_path)
    (teacher,) = load_teachers(config_of(model_dir, tmp_path), teachers, WORLD, print)
    packed = build_batch(ragged[:1])
    with teacher.scoring() as scorer:
        ours = hidden_states(scorer, packed.teacher, attention="padded") @ lm_head_weight(scorer).T
    assert packed.teacher is not None
    ids = packed.teacher.token_ids[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits[0, packed.teacher.loss_positions]
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_packed_attention_that_the_teacher_cannot_run_is_refused(
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    tmp_path: Path,
    small_model: Callable[..., PreTrainedModel],
) -> None:
    small_model("Lfm2", vocab_size=350).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^teacher {tmp_path}: model.attention is 'packed'"):
        opened(tokenizer, model_dir, tmp_path, model__attention="packed")
    (teacher,) = opened(tokenizer, model_dir, tmp_path)
    (loaded,) = load_teachers(config_of(model_dir, tmp_path), [teacher], WORLD, print)
    assert loaded.attention == "padded"
