"""The report of every recipe's runs, a user's own among them, and of settings under which parts of
PAINT are off."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from paint_engine.config.schema import Config
from paint_engine.recipes import recipe_of
from paint_engine.report.__main__ import main
from paint_engine.report.page import write_report

PROBLEM = {
    "place": 0,
    "problem_id": "p:1",
    "problem": "What is two and three?",
    "solution": "It is $2 + 3 = 5$, thus $\\boxed{5}$.",
    "answer": "5",
    "truncated": False,
    "tokens": ["It", " is", " 5"],
    "token_loss": [0.5, -0.25, 0.02],
    "student_entropy": [0.5, 0.02, 0.0],
}
TEACHER = {
    "correct": True,
    "partial_solution": "It is $2 + 3 ...(omitted)...",
    "mask_ratio": 0.35,
    "overlap": 0.5,
    "anchors": [{"text": "2+3=5", "found": True}, {"text": "5", "found": False}],
    "teacher_entropy": [0.25, 0.04, 0.0],
}
PAINT = {
    "token_kl": [0.5, 0.02, 2.0],
    "clipped_mass": [0.0, 0.0, 0.5],
    "clipped_token_share": [False, False, True],
    "selected": [False, True, False],
}
SAMPLES: dict[str, dict[str, Any]] = {
    "paint": {**PROBLEM, **TEACHER, **PAINT},
    "sampled_token": {
        **PROBLEM,
        **TEACHER,
        "sampled_kl": [-0.5, 0.02, 0.0],
        "importance_weight": [1.0, 1.5, 0.9],
    },
    "grpo": {
        **PROBLEM,
        "correct": False,
        "reward": 0.0,
        "advantage": -0.53,
        "ratio": [1.0, 0.7, 1.1],
        "ratio_clipped_share": [False, True, False],
        "importance_weight": [1.0, 1.0, 1.0],
    },
    "grpo_paint": {
        **PROBLEM,
        **TEACHER,
        **PAINT,
        "reward": 1.0,
        "advantage": 0.53,
        "ratio": [1.0, 0.7, 1.1],
        "ratio_clipped_share": [False, True, False],
        "importance_weight": [1.0, 1.0, 1.0],
        "token_weight": [0.5, 1.5, 1.0],
    },
    "sft": PROBLEM,
}


def report(
    run_dir: Path, name: str, *, config: str | None = "", changes: dict[str, Any] | None = None
) -> tuple[str, str]:
    """The page, and its words.

    config: further keys of the objective's section; None = no file.
    """
    sample = SAMPLES[name] | (changes or {})
    recipe = recipe_of(Config.model_validate({"objective": {"name": name}}))
    keys = {key for quantity in recipe.display.curves for key, _ in quantity.series}
    metrics = [{"step": step, **dict.fromkeys(sorted(keys), 0.25)} for step in (1, 2)]
    lines = {
        "metrics.jsonl": metrics,
        "samples.jsonl": [{"step": 1, **sample}, {"step": 2, **sample}],
    }
    for file, records in lines.items():
        write_lines(run_dir / file, records)
    if config is not None:
        text = f'[objective]\nname = "{name}"\n{config}\n[train]\nbatch_size = 32\n'
        (run_dir / "config.toml").write_text(text)
    page = write_report(run_dir).read_text()
    return page, text_of(page)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def text_of(page: str) -> str:
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


def tokens_of(page: str) -> list[tuple[str, str]]:
    """Class and numbers of the first sample's tokens."""
    return re.findall(r'<span class="(k\d[^"]*)" data-v="([^"]+)">', page)[:3]


def test_sampled_tokens_are_coloured_by_the_log_ratio(tmp_path: Path) -> None:
    page, text = report(tmp_path, "sampled_token")
    classes, values = zip(*tokens_of(page), strict=True)
    # 0.5, 0.02 and 0 nats, whatever the sign.
    assert classes == ("k6", "k3", "k0")
    assert values[0] == ("sampled KL -0.5 · loss 0.5 · H_S 0.5 · H_T 0.25 nats · R 0.5 · weight 1")
    for phrase in (
        "The teacher scores only the sampled tokens",
        "Each token is coloured by its |log p_S - log p_T|",
        "overlap 50% hidden 35% mean sampled KL -0.16 nats",
        "1 of 2 anchors found in the rollout",
        "Sampled KL nats per token",
        "the part struck out was hidden from the teacher",
    ):
        assert phrase in text, phrase
    for absent in ("Unclipped", "tokens selected", "selected by entropy ratio", "of this run lack"):
        assert absent not in text, absent


def test_grpo_shows_rewards_and_no_teacher(tmp_path: Path) -> None:
    page, text = report(tmp_path, "grpo")
    classes, values = zip(*tokens_of(page), strict=True)
    assert classes == ("k6", "k3", "k0")
    assert values[1] == (
        "loss -0.25 · entropy 0.02 nats · ratio 0.7 · weight 1 · clipped, no gradient"
    )
    for phrase in (
        "GRPO has no teacher: there is no KL to a teacher",
        "Each token is coloured by its entropy",
        "✗ wrong",
        "reward 0 advantage -0.53 mean entropy 0.173 nats",
        "Verified solution It is",
        "rollouts per step 32",
        "Ratio clip share",
        "Loss per token",
    ):
        assert phrase in text, phrase
    for absent in ("anchors found", "hidden from the teacher", "Unclipped", "of this run lack"):
        assert absent not in text, absent


def test_grpo_paint_shows_the_reward_the_teacher_and_each_part_of_the_loss(
    tmp_path: Path,
) -> None:
    page, text = report(tmp_path, "grpo_paint")
    classes, values = zip(*tokens_of(page), strict=True)
    assert classes == ("k6", "k3 sel", "k7")
    assert values[1] == (
        "KL 0.02 · loss -0.25 · H_S 0.02 · H_T 0.04 nats · R 2 · clipped mass 0 · ratio 0.7 · "
        "weight 1 · token weight 1.5 · clipped, no gradient"
    )
    for phrase in (
        "Loss by part per token policy gradient 0.25 → 0.25 divergence, before its weight",
        "Reward mean over rollouts",
        "Rollouts that the teacher trains share judged as objective.on asks",
        "Unclipped KL nats per token",
        "reward 1 advantage +0.53",
        "the part struck out was hidden from the teacher",
    ):
        assert phrase in text, phrase
    assert "of this run lack" not in text


def test_a_suppressed_token_is_named(tmp_path: Path) -> None:
    page, _ = report(tmp_path, "grpo", changes={"suppressed_share": [False, False, True]})
    assert ["made less likely" in values for _, values in tokens_of(page)] == [False, False, True]


def test_sft_shows_the_reference_and_no_verdict(tmp_path: Path) -> None:
    page, text = report(tmp_path, "sft")
    assert [css for css, _ in tokens_of(page)] == ["k6", "k5", "k3"]
    assert tokens_of(page)[0][1] == "loss 0.5 · H_S 0.5 nats"
    for phrase in (
        "SFT trains on the reference solutions: nothing is sampled",
        "the reference solution that was trained on. Each token is coloured by its loss",
        "mean loss 0.09 nats",
        "Reference solutions 2 of 2 recorded reference solutions",
        "Reference solution It is 5",
        "solutions per step 32",
    ):
        assert phrase in text, phrase
    for absent in (
        "rollouts",
        "Completion",
        "✓ correct",
        "✗ wrong",
        "anchors found",
        "Unclipped",
        "of this run lack",
    ):
        assert absent not in text, absent


def test_without_interpolation_no_token_is_marked(tmp_path: Path) -> None:
    page, text = report(tmp_path, "paint", config="interpolation_weight = 0.03")
    assert [css for css, _ in tokens_of(page)] == ["k6", "k3 sel", "k7"]
    assert "1 of 3 tokens selected" in text and "selected by entropy ratio" in text
    page, text = report(tmp_path, "paint", config="interpolation_weight = 0.0")
    assert [css for css, _ in tokens_of(page)] == ["k6", "k3", "k7"]
    assert "tokens selected" not in text and "selected by entropy ratio" not in text


def test_without_a_pointwise_clip_none_is_spoken_of(tmp_path: Path) -> None:
    page, text = report(tmp_path, "paint", config="pointwise_clip = 0.06")
    assert "Pointwise clip share" in text and "clipped mass 0.5" in page
    page, text = report(tmp_path, "paint", config='pointwise_clip = "none"')
    assert "Pointwise clip" not in text and "clipped mass" not in page
    # The configuration is shown as it is.
    assert '<th scope="row">pointwise_clip</th><td>none</td>' in page


def test_sft_that_kept_nothing_misses_a_solution(tmp_path: Path) -> None:
    report(tmp_path, "sft")
    (tmp_path / "samples.jsonl").unlink()
    assert "No solution was kept (run.samples_per_step)" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("divergence", "phrases"),
    [
        ("forward_kl", ("Unclipped KL nats per token KL(teacher, student)", "mean KL 0.84 nats")),
        ("reverse_kl", ("Unclipped KL nats per token KL(student, teacher)", "mean KL 0.84 nats")),
        ("jsd", ("Unclipped JSD nats per token", "mean JSD 0.84 nats", "its unclipped JSD")),
    ],
)
def test_the_divergence_is_called_by_its_name(
    divergence: str, phrases: tuple[str, ...], tmp_path: Path
) -> None:
    page, text = report(tmp_path, "paint", config=f'divergence = "{divergence}"')
    for phrase in phrases:
        assert phrase in text, phrase
    assert tokens_of(page)[0][1].startswith(phrases[1].split()[1])


def test_a_teacher_that_reasoned_first_is_quoted(tmp_path: Path) -> None:
    _, text = report(tmp_path, "paint", changes={"rationale": "First <b>add</b> both."})
    assert "Rationale that the teacher wrote before scoring First <b>add</b> both." in text
    _, text = report(tmp_path, "paint")
    assert "What the teacher wrote" not in text


def shown(context: str, source: str, seen: str, **masked: Any) -> dict[str, Any]:
    """A sample of this version, in place of one of an earlier one."""
    view = {"context": context, "source": source, "shown": seen, **masked}
    old = ("partial_solution", "mask_ratio", "overlap", "anchors")
    return {**{key: v for key, v in SAMPLES["paint"].items() if key not in old}, **view}


OTHER = {
    "text": "It is $20 - 8 = 12$.",
    "mask_ratio": 0.35,
    "overlap": 0.5,
    "anchors": [{"text": "20-8=12", "found": True}, {"text": "12", "found": False}],
}


@pytest.mark.parametrize(
    ("sample", "phrases"),
    [
        (
            shown("other", "p:7", "It is $20 - ...(omitted)...", **OTHER),
            (
                "Text for the teacher (other; p:7); the part struck out was hidden from the "
                "teacher It is $20 - 8 = 12$. 1 of 2 anchors found in the rollout",
                "Verified solution It is $2 + 3 = 5$, thus",
                "overlap 50% hidden 35%",
            ),
        ),
        (
            shown("other", "p:7", OTHER["text"], **OTHER),
            ("Text for the teacher (other; p:7); the teacher saw all of it It is $20",),
        ),
        (
            shown("sibling", "rollout 3 of the batch", "So 5."),
            (
                "What the teacher was shown (sibling; rollout 3 of the batch) So 5.",
                "Verified solution It is $2 + 3 = 5$, thus",
            ),
        ),
        (
            shown("mine:Own", "p:1", "Five."),
            ("What the teacher was shown (mine:Own; p:1) Five.",),
        ),
        (shown("none", "", ""), ("The teacher saw the problem alone (none)",)),
        (
            shown("sibling", "rollout 3 of the batch", "So 5.", scored_by=["kites"]),
            ("So 5. Scored by the teacher kites. Verified solution",),
        ),
        (
            shown("none", "", "", scored_by=["org/<one>", "org/two"]),
            ("alone (none) Scored by the teachers org/<one>, org/two. Verified solution",),
        ),
    ],
)
def test_what_the_teacher_was_shown_is_shown_with_whose_it_is(
    sample: dict[str, Any], phrases: tuple[str, ...], tmp_path: Path
) -> None:
    report(tmp_path, "paint")
    write_lines(tmp_path / "samples.jsonl", [{"step": 1, **sample}])
    page = write_report(tmp_path).read_text()
    text = text_of(page)
    for phrase in phrases:
        assert phrase in text, phrase
    assert ("Scored by" in text) == ("scored_by" in sample)
    masked = "mask_ratio" in sample
    assert ("anchors found in the rollout" in text) == masked == ("overlap 50%" in text)
    assert ('<del class="hidden">8 = 12$.</del>' in page) == ("...(omitted)..." in sample["shown"])


def test_a_sample_of_an_earlier_version_is_shown_as_one_of_this(tmp_path: Path) -> None:
    _, old = report(tmp_path, "paint")
    mask = {key: TEACHER[key] for key in ("mask_ratio", "overlap", "anchors")}
    sample = shown("solution", "p:1", TEACHER["partial_solution"], **mask)
    write_lines(tmp_path / "samples.jsonl", [{"step": step, **sample} for step in (1, 2)])
    assert text_of(write_report(tmp_path).read_text()) == old
    assert "Verified solution; the part struck out was hidden" in old


@pytest.mark.parametrize("name", list(SAMPLES))
def test_without_a_configuration_the_records_tell_the_objective(name: str, tmp_path: Path) -> None:
    page, _ = report(tmp_path, name)
    (tmp_path / "config.toml").unlink()
    without, text = report(tmp_path, name, config=None)
    assert tokens_of(without) == tokens_of(page)
    assert text.count("Missing from this run") == 1 and "of this run lack" not in text


def test_a_batch_without_a_signal_is_grpos_too(tmp_path: Path) -> None:
    """None of it went through the model: there is no ratio, and no sample is kept."""
    skipped = {"loss": 0.0, "reward": 1.0, "zero_variance_groups": 4, "accuracy": 1.0}
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, **skipped} for step in (1, 2)])
    text = text_of(write_report(tmp_path).read_text())
    assert "GRPO has no teacher" in text and "Groups without a signal groups per step" in text


OWN = """
from paint_engine.recipes import Recipe
from paint_engine.recipes.display import LOSS, Display, Quantity, TokenColor


class {name}(Recipe):
    @property
    def display(self):
        return Display(
            console=(LOSS,),
            curves=(Quantity("Surprise", "nats per answer", (("surprise", "of the student"),)),),
            token_color=TokenColor("surprise", "surprise", "surprise"),
            columns="Left, what was asked. Right, what came",
            absent="Nobody teaches here.",
            thing="answer",
            things="answers",
        )

    def loss(self, inputs):
        return inputs
"""


def test_a_users_recipe_is_run_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, run = "own_recipe_of_a_report", tmp_path / "run"
    run.mkdir()
    (tmp_path / f"{module}.py").write_text(OWN.format(name="Mine") + OWN.format(name="Other"))
    monkeypatch.syspath_prepend(tmp_path)
    sample = PROBLEM | {"step": 1, "correct": True, "surprise": [0.5, -0.02, 0.0]}
    write_lines(run / "samples.jsonl", [sample])
    write_lines(run / "metrics.jsonl", [{"step": 1, "surprise": 0.25}])
    config = f'[objective]\nname = "{module}:Mine"\n[train]\nbatch_size = 32\n'
    (run / "config.toml").write_text(config)
    refused = re.escape(
        f"error: {run} was trained with the recipe '{module}:Mine'; its code runs only if you name "
        f"the recipe; if you trust it, use --recipe {module}:Mine"
    )
    for options in ([], ["--recipe", f"{module}:Other"], ["--recipe", "paint"]):
        with pytest.raises(SystemExit) as stop:
            main([str(run), *options])
        assert stop.value.code == 2
        assert re.fullmatch(refused, capsys.readouterr().out.strip())
        with pytest.raises(ValueError, match="its code runs only if you name the recipe"):
            write_report(run)
    assert module not in sys.modules and not (run / "report.html").exists()

    main([str(run), "--recipe", f"{module}:Mine"])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    classes, values = zip(*tokens_of(page), strict=True)
    # 0.5, 0.02 and 0 nats, whatever the sign.
    assert classes == ("k6", "k3", "k0")
    assert "surprise 0.5" in values[0]
    text = text_of(page)
    for phrase in (
        "Surprise nats per answer of the student 0.25 → 0.25",
        "Nobody teaches here.",
        "Left, what was asked. Right, what came. Each token is coloured by its surprise",
        "1 of 1 recorded answers",
        "answers per step 32",
        "mean surprise 0.16 nats",
        f"objective {module}:Mine",
    ):
        assert phrase in text, phrase
    for absent in ("Unclipped", "hidden from the teacher", "tokens selected", "of this run lack"):
        assert absent not in text, absent
