"""The settings are listed once, and reach the public signatures and the operators from there."""

import ast
import dataclasses
import inspect
import math
import typing
from pathlib import Path

import pytest
import torch

import paint_kernels
from paint_kernels import (
    LossOptions,
    LossSettings,
    PaintLoss,
    paint_loss,
    paint_loss_from_logits,
    paint_loss_from_topk,
    reference,
    reference_topk,
)
from paint_kernels._shards import Shard

FIELDS = {field.name: field for field in dataclasses.fields(LossSettings)}
OPERATORS = (
    "paint_loss",
    "paint_loss_head_gradient",
    "paint_loss_from_logits",
    "paint_loss_teacher_top_k",
    "paint_loss_from_topk",
    "support_hidden_gradient",
    "support_head_gradient",
)
EXECUTION = ("backend", "chunk_rows")
"""fields that are arguments of their own: how the loss is computed, and not which"""


def test_options_are_the_settings_but_those_of_the_execution():
    types = {name: field.type for name, field in FIELDS.items() if name not in EXECUTION}
    types["temperature"] = float | torch.Tensor
    assert typing.get_type_hints(LossOptions) == types


@pytest.mark.parametrize(
    "function",
    [
        PaintLoss,
        paint_loss,
        paint_loss_from_logits,
        paint_loss_from_topk,
        reference.paint_loss,
        reference.paint_loss_from_logits,
        reference_topk.paint_loss_from_topk,
    ],
)
def test_a_signature_shows_every_option_with_its_default(function):
    parameters = inspect.signature(function).parameters
    for name in LossOptions.__annotations__:
        parameter = parameters[name]
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == FIELDS[name].default
        assert parameter.annotation == LossOptions.__annotations__[name]
    assert not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_takes_settings_and_shard_as_its_last_arguments(name):
    operator = getattr(torch.ops.paint_kernels, name).default
    names = [*FIELDS, *Shard.__dataclass_fields__]
    assert [argument.name for argument in operator._schema.arguments[-len(names) :]] == names


def names_spelled(node):
    """Names that a signature, a call, a class body or a display lists."""
    if isinstance(node, ast.arguments):
        return {argument.arg for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs)}
    if isinstance(node, ast.Call):
        return {keyword.arg for keyword in node.keywords} | names_in(node.args)
    if isinstance(node, ast.ClassDef):
        return names_in(line.target for line in node.body if isinstance(line, ast.AnnAssign))
    if isinstance(node, ast.FunctionDef):
        lines = [line for line in node.body if isinstance(line, ast.Assign)]
        return names_in(target for line in lines for target in line.targets)
    if isinstance(node, ast.Tuple | ast.List):
        return names_in(node.elts)
    if isinstance(node, ast.Dict):
        return names_in(key for key in node.keys if key is not None)
    return set()


def names_in(nodes):
    kinds = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value"}
    return {getattr(node, kinds[type(node)]) for node in nodes if type(node) in kinds}


def test_two_places_list_the_settings():
    """Adding one touches these and the code that uses it."""
    places = []
    for file in sorted(Path(paint_kernels.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if len(names_spelled(node) & FIELDS.keys()) > len(FIELDS) / 2:
                places.append((file.name, getattr(node, "name", type(node).__name__)))
    assert places == [("_settings.py", "LossOptions"), ("_settings.py", "LossSettings")]


def test_settings_survive_an_operator():
    settings = LossSettings(temperature=2, pointwise_clip=None, teacher_top_k=3, backend="torch")
    again = LossSettings(**dict(zip(FIELDS, settings.arguments(), strict=True)))
    assert again == settings and LossSettings(**settings.keywords()) == settings
    assert type(settings.temperature) is float and settings.teacher_top_k == 3


def test_a_module_refuses_its_settings_at_once():
    for options in ({"temperature": math.nan}, {"divergence": "kl"}, {"backend": "cuda"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            PaintLoss(**options)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        PaintLoss(temprature=1.0)
