"""TRL's trainers with `paint_loss`, with TRL's own beside them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from peft import LoraConfig
from torch import Tensor
from trl.trainer.distillation_config import DistillationConfig

pytestmark = [
    # Raised at the module's first import, which is why that waits for the test.
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
    # TRL's configurations and its sampling use names that transformers has renamed.
    pytest.mark.filterwarnings(
        r"ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
    ),
]

NUM_STEPS = 3
TOLERANCE = 1e-5
"""of the distance that the weights have moved; float32 rounding leaves up to 4e-6"""

SHARED_SETTINGS: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}

datasets_logging.disable_progress_bar()


MANY_STOP_TOKENS = list(range(600, 768))
"""so that random models end some completions early, and the padding behind them matters"""


def equal_settings(beta: float) -> dict[str, Any]:
    """What docs/integrations.md gives for TRL's own loss, a mean over tokens."""
    divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    plain = {"divergence": divergence, "pointwise_clip": None, "interpolation_weight": 0.0}
    plain |= {"reduction": "token_mean"}
    return plain | ({"jsd_weight": beta} if divergence == "jsd" else {})


def conversations() -> list[dict[str, Any]]:
    rows = []
    for i in range(12):
        answer = f"The answer is {3 * i}." + " Yes." * (i % 4)
        question = {"role": "user", "content": f"Tom has {i} apples."}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    return rows


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": f"Tom has {i} apples." + " And more." * (i % 3)} for i in range(12)]


def configuration(name: str, output_dir: Path, options: dict[str, Any]) -> Any:
    """GKD off-policy, on the data set's completions, unless the options say otherwise."""
    settings: dict[str, Any] = SHARED_SETTINGS | {"output_dir": str(output_dir)}
    if name == "DistillationTrainer":
        settings |= {"max_completion_length": 8, "per_device_eval_batch_size": 4}
        return DistillationConfig(**(settings | options))
    from trl.experimental.gkd import GKDConfig

    settings |= {"lmbda": 0.0, "max_length": 64, "max_new_tokens": 8}
    return GKDConfig(**(settings | options))


def trainer_classes(name: str) -> tuple[Any, Any]:
    """TRL's class and ours. The import waits for the test, whose filters it needs."""
    if name == "GKDTrainer":
        from trl.experimental.gkd import GKDTrainer

        from paint_engine.integrations.gkd import PaintGKDTrainer

        return GKDTrainer, PaintGKDTrainer
    from trl import DistillationTrainer

    from paint_engine.integrations.trl import PaintDistillationTrainer

    return DistillationTrainer, PaintDistillationTrainer


@pytest.fixture(params=["GKDTrainer", "DistillationTrainer"])
def setup(request, make_model, tokenizer, tmp_path) -> SimpleNamespace:
    """TRL's class, ours, and run(class, **settings) -> (trainer, student, teacher)."""
    name = request.param
    theirs, ours = trainer_classes(name)
    rows = conversations() if name == "GKDTrainer" else prompts()

    def run(
        trainer_class: Any,
        *,
        loss_settings: dict[str, Any] | None = None,
        peft_config: LoraConfig | None = None,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        student, teacher = make_model(0), make_model(1, hidden_size=48, tied=False)
        student.generation_config.eos_token_id = MANY_STOP_TOKENS
        trainer = trainer_class(
            model=student,
            teacher_model=teacher,
            args=configuration(name, tmp_path, options),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tokenizer,
            peft_config=peft_config,
            **({} if loss_settings is None else {"loss_settings": loss_settings}),
        )
        trainer.train()
        return trainer, student, teacher

    return SimpleNamespace(name=name, theirs=theirs, ours=ours, run=run)


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def relative_gap(got: Tensor, expected: Tensor, start: Tensor) -> float:
    """|got - expected| / |expected - start|, and a check that there is a distance at all."""
    moved = (expected - start).norm()
    assert moved > 1e-3 * start.norm()
    return ((got - expected).norm() / moved).item()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equal_settings_train_equal_weights(setup, make_model, flat_weights, beta):
    their_trainer, expected, _ = setup.run(setup.theirs, beta=beta, logging_steps=1)
    our_trainer, got, _ = setup.run(setup.ours, loss_settings=equal_settings(beta), logging_steps=1)
    start = flat_weights(make_model(0))
    assert relative_gap(flat_weights(got), flat_weights(expected), start) < TOLERANCE
    losses = logged(our_trainer, "loss")
    assert len(losses) == NUM_STEPS
    assert losses == pytest.approx(logged(their_trainer, "loss"), rel=1e-5)


def test_equal_settings_train_equal_adapters(setup):
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trained = []
    for trainer_class, settings in [(setup.theirs, None), (setup.ours, equal_settings(0.0))]:
        trainer, *_ = setup.run(
            trainer_class, loss_settings=settings, beta=0.0, peft_config=adapters
        )
        parameters = trainer.model.named_parameters()
        trained.append({name: p.detach() for name, p in parameters if p.requires_grad})
    # B starts at zero, so that what it is now is what it has learnt.
    flat = [torch.cat([w.flatten() for n, w in t.items() if "lora_B" in n]) for t in trained]
    assert relative_gap(flat[1], flat[0], torch.zeros_like(flat[0])) < TOLERANCE
    assert not any("lm_head" in name or "base_layer" in name for name in trained[1])


def test_the_mean_over_rollouts_does_not_depend_on_micro_batches(setup, make_model, flat_weights):
    trained = []
    for batch_size, settings in [(2, {}), (4, {}), (4, {"reduction": "token_mean"})]:
        _, student, _ = setup.run(
            setup.ours,
            loss_settings=settings,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
        )
        trained.append(flat_weights(student))
    start = flat_weights(make_model(0))
    assert relative_gap(trained[0], trained[1], start) < TOLERANCE
    assert relative_gap(trained[2], trained[1], start) > 0.01


@pytest.mark.parametrize("bf16", [False, True])
def test_the_paint_loss_trains_the_student_alone(setup, make_model, flat_weights, bf16):
    """Clip and interpolation lead elsewhere than the forward KL. Both trainers sample."""
    options = {"lmbda": 1.0} if setup.name == "GKDTrainer" else {}
    _, student, teacher = setup.run(setup.ours, bf16=bf16, **options)
    _, plain, _ = setup.run(setup.ours, loss_settings=equal_settings(0.0), bf16=bf16, **options)
    start = flat_weights(make_model(0))
    assert flat_weights(student).isfinite().all()
    assert relative_gap(flat_weights(student), flat_weights(plain), start) > 0.01
    untouched = make_model(1, hidden_size=48, tied=False)
    assert torch.equal(flat_weights(teacher), flat_weights(untouched))


def test_the_student_comes_nearer_to_the_teacher(setup):
    options = {"max_steps": 30, "logging_steps": 1, "learning_rate": 1.0}
    trainer, _, _ = setup.run(setup.ours, **options)
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("setup", ["DistillationTrainer"], indirect=True)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_evaluation_and_entropies_are_those_of_trl(setup, beta):
    """At the trainer's own temperature, on completions of different lengths."""
    measured = []
    for trainer_class, settings in [(setup.theirs, None), (setup.ours, equal_settings(beta))]:
        trainer, *_ = setup.run(
            trainer_class, loss_settings=settings, beta=beta, temperature=0.7, logging_steps=1
        )
        assert logged(trainer, "completions/min_length") < logged(trainer, "completions/max_length")
        torch.manual_seed(11)
        measured.append(trainer.evaluate() | {"entropy": logged(trainer, "entropy")[0]})
    for key in ("eval_loss", "eval_entropy", "entropy"):
        assert measured[1][key] == pytest.approx(measured[0][key], rel=1e-5), key


def test_the_loss_may_have_a_temperature_of_its_own(setup):
    """`args.temperature` is the default in DistillationTrainer, and in neither the last word."""
    losses = []
    for settings in [{}, {"temperature": 2.0}]:
        trainer, *_ = setup.run(
            setup.ours, loss_settings=settings, temperature=0.7, logging_steps=1, max_steps=1
        )
        losses.append(logged(trainer, "loss")[0])
    is_on_policy = setup.name == "DistillationTrainer"
    assert trainer.loss_settings["temperature"] == 2.0
    assert losses[0] != pytest.approx(losses[1], rel=0.05)
    default, *_ = setup.run(setup.ours, temperature=0.7, max_steps=1)
    assert default.loss_settings.get("temperature") == (0.7 if is_on_policy else None)


@pytest.mark.parametrize("setup", ["DistillationTrainer"], indirect=True)
def test_images_are_refused(setup):
    trainer, *_ = setup.run(setup.ours, max_steps=1)
    with pytest.raises(ValueError, match="the batch has pixel_values"):
        trainer._compute_loss(trainer.model, {"pixel_values": torch.zeros(1)}, None)
