"""A recipe of a user's own module: refused or used by its name, and trained with."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from paint_engine.config.command_line import load_config
from paint_engine.config.toml import to_toml
from paint_engine.files import read_jsonl
from paint_engine.recipes import Recipe, recipe_of

Main = Callable[[Sequence[str]], int]
# Half the squared surprise at each token: no built-in recipe has such a loss.
OWN = '''
from paint_engine.recipes import LossInputs, LossOutput, Recipe
from paint_engine.recipes.display import ConsoleField, Display, Quantity, TokenColor


class Calm(Recipe):
    """Half of the squared log-probability of each sampled token."""

    keys = ("objective.jsd_weight",)
    needs_solution = False

    @property
    def display(self):
        return Display(
            console=(ConsoleField("surprise", "surprise", "{:.3f} nats"),),
            curves=(Quantity("Surprise", "nats per token", (("surprise", "student"),)),),
            token_color=TokenColor("surprise", "surprise", "surprise"),
            columns="Left, the problem. Right, what the student wrote",
        )

    def loss(self, inputs):
        from paint_engine.recipes import tokens

        section = self.config.objective
        student = tokens.student_logprobs(inputs, section.temperature)
        token_loss = 0.5 * student.logprobs.square()
        loss = tokens.reduced(token_loss, inputs.cu_seqlens, section.reduction, inputs.denominator)
        return LossOutput(
            loss, {"token_loss": token_loss.detach(), "surprise": -student.logprobs.detach()}
        )

    def metrics(self, examples):
        return super().metrics(examples) | {"num_rollouts": len(examples)}


class NoRecipe:
    pass


calm = Calm
answer = 42
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module with `OWN`, another one for each test: a module is imported once."""
    name = "own_" + re.sub(r"\W", "_", request.node.name)
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(OWN)
    (folder / f"{name}_broken.py").write_text("x = 1 / 0\n")
    monkeypatch.syspath_prepend(folder)
    return name


def refusal(name: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(["--objective.name", name])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_is_named_by_its_module_and_class(module: str, tmp_path: Path) -> None:
    for name in (f"{module}:Calm", f"{module}:calm"):
        config = load_config(["--objective.name", name]).config
        recipe = recipe_of(config)
        assert (type(recipe).__module__, type(recipe).__name__) == (module, "Calm")
        assert isinstance(recipe, Recipe) and recipe.config is config
        file = tmp_path / "mine.toml"
        file.write_text(to_toml(config))
        assert load_config(["--config", str(file)]).config == config


def test_it_accepts_the_keys_that_it_declares_alone(module: str) -> None:
    argv = ["--objective.name", f"{module}:Calm"]
    config = load_config([*argv, "--objective.jsd_weight", "0.9"]).config
    assert config.objective.jsd_weight == 0.9
    with pytest.raises(ValueError) as caught:
        load_config([*argv, "--grpo.kl_weight", "0.04"])
    assert str(caught.value) == (
        f"grpo.kl_weight: got 0.04 with objective.name '{module}:Calm', which does not read it; "
        "set --grpo.kl_weight 0.0, or use --objective.name grpo"
    )


@pytest.mark.parametrize("name", ["NoRecipe", "answer", "Calm.check"])
def test_what_is_no_recipe_is_refused(name: str, module: str) -> None:
    message = refusal(f"{module}:{name}")
    assert message.startswith(f"objective.name: got '{module}:{name}', which is ")
    assert message.endswith(
        "; needs a subclass of paint_engine.recipes.Recipe; name the class itself, as in "
        "my_module:MyRecipe"
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("{}:Clam", ("needs an attribute of {}, which has no 'Clam'", "did you mean Calm?")),
        ("{}:Xyzzy", ("which has no 'Xyzzy'; correct the part after the colon",)),
        ("no_{}:Calm", ("needs a module that Python can import (No module named 'no_{}')",)),
        ("{}_broken:Calm", ("ZeroDivisionError", "{}_broken.py:1", "; fix the error")),
        ("./{}.py:Calm", ("needs module:attribute", "for the object f in ./my_module.py give")),
        ("{}:", ("needs module:attribute",)),
    ],
)
def test_what_is_missing_is_refused(name: str, parts: tuple[str, ...], module: str) -> None:
    message = refusal(name.format(module))
    assert message.startswith(f"objective.name: got {name.format(module)!r}")
    for part in parts:
        assert part.format(module) in message, part


def test_a_name_that_nothing_has_is_refused_with_the_nearest() -> None:
    names = "grpo, grpo_paint, paint, sampled_token, sft"
    needed = f"needs one of {names}, or module:attribute of your own"
    assert refusal("gspo") == f"objective.name: got 'gspo'; {needed}; did you mean grpo?"
    assert refusal("xyzzy") == f"objective.name: got 'xyzzy'; {needed}"
    # Modules of the package that are no recipes.
    assert refusal("tokens") == f"objective.name: got 'tokens'; {needed}"


def test_one_step_trains_with_its_own_loss(
    module: str,
    run_main: Main,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {
        "objective.name": f"{module}:Calm",
        "objective.reduction": "token_mean",
        "train.num_steps": "1",
        "eval.enabled": "false",
        "run.samples_per_step": "3",
    }
    argv = [*command, *(part for key, value in options.items() for part in (f"--{key}", value))]
    assert run_main(argv) == 0
    run = tmp_path / "run"
    (step,) = read_jsonl(run / "metrics.jsonl")
    samples = read_jsonl(run / "samples.jsonl")
    surprises = [value for sample in samples for value in sample["surprise"]]
    assert len(samples) == 3 and len(surprises) == step["num_loss_tokens"] > 3
    assert step["surprise"] == pytest.approx(math.fsum(surprises) / len(surprises), rel=1e-5)
    by_hand = math.fsum(0.5 * value**2 for value in surprises) / len(surprises)
    assert step["loss"] == pytest.approx(by_hand, rel=1e-5) and step["loss"] > 0.01
    # The rollouts' means are logged beside its own metric; nobody scored them.
    assert step["num_rollouts"] == 3 and 0 <= step["accuracy"] <= 1
    assert not {"token_kl", "teacher_entropy", "mask_ratio", "token_loss"} & step.keys()
    assert not {"shown", "advantage"} & samples[0].keys()
    # The gradient of its loss has moved the adapters.
    assert step["grad_norm"] > 0
    (file,) = (run / "checkpoints" / "step-1").glob("*model.safetensors")
    weights = load_file(file)
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())
    assert re.search(r"step 1/1  surprise \d+\.\d{3} nats  ", capsys.readouterr().out)
    page = (run / "report.html").read_text()
    assert "Left, the problem. Right, what the student wrote" in page
    assert "coloured by its surprise" in page
