"""The report of a made-up run of 40 steps on word problems, and of runs that lack something."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paint_engine.config.schema import Config
from paint_engine.recipes import recipe_of
from paint_engine.recipes.display import Quantity
from paint_engine.report.__main__ import main
from paint_engine.report.page import write_report
from paint_engine.report.samples import MAX_SAMPLES, MAX_TOKENS

MARKER = "...(omitted)..."
PROBLEM = (
    "A machine makes 19 clocks an hour and runs for 10 hours. Of these, 20 percent are broken and "
    "Mia throws them away. The good ones are sold for 5 dollars each. How many dollars is that?"
)
SOLUTION = (
    "The number of clocks made is $19 \\times 10 = 190$.\nThe number of broken clocks is "
    "$\\frac{20}{100} \\times 190 = 38$.\nWhat is good is $190 - 38 = 152$.\nWe compute what they "
    "bring: $152 \\times 5 = 760$.\nThis gives $\\boxed{760}$ in the end."
)
COMPLETION = (
    "We compute the clocks made: $19 \\times 10 = 190$.\nSo the number of broken clocks is "
    "$\\frac{20}{100} \\times 190 = 38$.\nWhat is good comes to $190 - 38 = {good}$.\nThe money is "
    "${good} \\times 5 = {money}$.\nTherefore the answer is $\\boxed{{money}}$.<|im_end|>"
)
CONFIG = """
[model]
name_or_path = "tiny"
dtype = "float32"
[lora]
enabled = true
rank = 64
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
[data]
path = "tiny"
on_bad_row = "stop"
[data.columns]
problem = "none"
[masking]
rho_wrong = 0.3
rho_correct = 0.4
placement = "suffix"
marker = "...(omitted)..."
[objective]
name = "paint"
pointwise_clip = 0.06
top_fraction = 0.03
interpolation_weight = 0.03
entropy_floor = 1e-6
[train]
num_steps = 40
batch_size = 32
seed = 0
"""


def made_up_metrics(num_steps: int) -> list[dict[str, float]]:
    draw = random.Random(0)
    metrics = []
    for step in range(1, num_steps + 1):
        progress = step / 40
        decay = math.exp(-1.6 * progress)
        accuracy = round(32 * min(1, 0.46 + 0.26 * (1 - decay) + draw.gauss(0, 0.08))) / 32
        overlap = 0.55 + 0.2 * (1 - decay) + draw.gauss(0, 0.02)
        kl = 0.085 * decay + 0.022 + draw.gauss(0, 0.004)
        seconds = {"seconds_rollout": draw.uniform(0.9, 1.2), "seconds_score": 0.21}
        seconds["seconds_update"] = draw.uniform(0.5, 0.62)
        metrics.append(
            {
                "step": step,
                "loss": 0.42 * kl + draw.gauss(0, 0.001),
                "token_kl": kl,
                "clipped_mass": 0.05 * decay + 0.01 + draw.gauss(0, 0.002),
                "clipped_token_share": 0.11 * decay + 0.03 + draw.gauss(0, 0.004),
                "student_entropy": 0.31 - 0.08 * (1 - decay) + draw.gauss(0, 0.006),
                "teacher_entropy": 0.18 - 0.02 * (1 - decay) + draw.gauss(0, 0.005),
                "overlap": overlap,
                "mask_ratio": 0.3 + 0.1 * overlap,
                "accuracy": accuracy,
                "truncation_rate": max(0.0, 0.05 * decay + draw.gauss(0, 0.01)),
                "completion_length": 96 - 10 * progress + draw.gauss(0, 2),
                "checker_errors": 0,
                "grad_norm": 0.7 * decay + 0.25 + draw.gauss(0, 0.05),
                "learning_rate": 3e-4,
                "num_loss_tokens": 3000 + draw.randrange(200),
                "tokens_per_s": 1650 + draw.gauss(0, 60),
                "seconds": sum(seconds.values()),
                **seconds,
            }
        )
    return metrics


def made_up_sample(step: int, **changes: Any) -> dict[str, Any]:
    draw = random.Random(step)
    correct = draw.random() < 0.4 + step / 80
    good, money = ("152", "760") if correct else ("142", "710")
    completion = COMPLETION.replace("{good}", good).replace("{money}", money)
    tokens = re.findall(r"<\|im_end\|>|\\?[a-z]+|[A-Z][a-z]*|\d| [a-zA-Z]+|\s|.", completion)
    student = [draw.expovariate(2.0 if token[-1].isdigit() else 12.0) for token in tokens]
    teacher = [entropy * draw.uniform(0.1, 0.9) for entropy in student]
    token_kl = [entropy * math.exp(draw.gauss(-3.0, 1.5)) for entropy in student]
    ratios = [h_t / max(h_s, 1e-6) for h_t, h_s in zip(teacher, student, strict=True)]
    threshold = sorted(ratios)[-math.ceil(0.03 * len(tokens))]
    anchors = ["19*10=190", "\\frac{20}{100}*190=38", "190-38=152", "152*5=760", "760"]
    found = [correct or i < 2 for i in range(len(anchors))]
    overlap = sum(found) / len(found)
    mask_ratio = 0.3 + 0.1 * overlap
    return {
        "step": step,
        "problem_id": f"tiny/train:{1000 + step}",
        "problem": PROBLEM,
        "solution": SOLUTION,
        "answer": "760",
        "partial_solution": SOLUTION[: len(SOLUTION) - round(mask_ratio * len(SOLUTION))] + MARKER,
        "mask_ratio": mask_ratio,
        "overlap": overlap,
        "anchors": [{"text": t, "found": f} for t, f in zip(anchors, found, strict=True)],
        "correct": correct,
        "truncated": False,
        "tokens": tokens,
        "token_loss": [min(kl, 0.06) for kl in token_kl],
        "token_kl": token_kl,
        "student_entropy": student,
        "teacher_entropy": teacher,
        "selected": [ratio >= threshold for ratio in ratios],
        "clipped_mass": [0.4 if kl > 0.06 else 0.0 for kl in token_kl],
        **changes,
    }


SUMMARY = {
    "avg_at_k_before": 0.482,
    "avg_at_k_after": 0.669,
    "pass_at_k_before": 0.844,
    "pass_at_k_after": 0.906,
    "num_samples": 12,
    "num_problems": 128,
    "paired_difference": 0.187,
    "paired_difference_ci95": [0.141, 0.232],
    "seconds": 141.2,
    "seconds_train": 83.4,
    "seconds_eval": 57.8,
    "num_steps": 40,
    "run_dir": "runs/tiny-1",
    "seed": 0,
    "preset": "tiny",
}


OBJECTIVES = (
    {"name": "paint"},
    {"name": "paint", "divergence": "reverse_kl"},
    {"name": "paint", "divergence": "jsd"},
    {"name": "sampled_token"},
    {"name": "grpo"},
    {"name": "sft"},
)


def curves_of(objective: dict[str, str]) -> tuple[Quantity, ...]:
    return recipe_of(Config.model_validate({"objective": objective})).display.curves


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "tiny-20260101-120000"
    run.mkdir()
    write_lines(run / "metrics.jsonl", made_up_metrics(40))
    write_lines(run / "samples.jsonl", [made_up_sample(1 + i // 2) for i in range(80)])
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "config.toml").write_text(CONFIG)
    return run


class _PageParser(HTMLParser):
    """Fails on an element that is closed out of order; collects what a browser would act on."""

    VOID = frozenset({"meta", "path", "rect", "use", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parse(page: str) -> _PageParser:
    parser = _PageParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", "".join(parse(page).words))


def test_page_is_balanced_and_its_ids_are_unique(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = parse(path.read_text())
    assert path == run_dir / "report.html"
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', path.read_text()))
    assert references and references <= set(page.ids)
    assert path.stat().st_size < 500_000
    assert not (run_dir / "report.html.tmp").exists()


def test_page_loads_nothing_and_runs_nothing(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    elements = parse(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert re.findall(r"url\((.)", page) == ["#"] * page.count("url(")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in elements


def test_headline_and_sections(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    text = text_of(page)
    for phrase in (
        "Avg@12 on 128 problems, before and after 48.2% → 66.9%",
        "+18.7 points",
        "95% interval: +14.1 to +23.2 points",
        "40 of 40",
        "1 min 23 s",
        "57.8 s",
        "84.4% → 90.6%",
        "6 of 80 recorded rollouts",
    ):
        assert phrase in text
    for setting, value in (("pointwise_clip", "0.06"), ("columns.problem", "none")):
        assert f'<th scope="row">{setting}</th><td>{value}</td>' in page
    quantities = [quantity for objective in OBJECTIVES for quantity in curves_of(objective)]
    captions = {f"{q.title} {q.unit}": False for q in quantities}
    # The run's context always has something to show and the teacher trains all, so that there is no
    # share of either.
    absent = ("Rollouts with a context", "Rollouts that the teacher trains")
    captions |= {f"{q.title} {q.unit}": q.title not in absent for q in curves_of({"name": "paint"})}
    assert not all(captions.values())
    for caption, drawn in captions.items():
        assert (caption in text) is drawn, caption
    assert [i for i in parse(page).ids if i.isalpha()] == [
        "curves",
        "kinds",
        "rollouts",
        "configuration",
    ]
    assert "Missing from this run" not in text


def test_difference_below_zero_keeps_its_sign_and_place(run_dir: Path) -> None:
    worse = {"paired_difference": -0.02, "paired_difference_ci95": [-0.06, 0.02]}
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | worse))
    page = write_report(run_dir).read_text()
    assert "\N{MINUS SIGN}6.0 to +2.0 points" in text_of(page)
    places = [
        float(p) for p in re.findall(r'class="(?:span|dot|zero)" style="left: ([\d.]+)%', page)
    ]
    zero, low, difference = places
    assert 0 < low < difference < zero < 100


EVALUATIONS = [
    # Of a version that did not record lengths.
    {"step": 0, "avg_at_k": 0.482, "pass_at_k": {"1": 0.482}},
    {
        **{"step": 20, "avg_at_k": 0.6, "pass_at_k": {"1": 0.6}, "truncation_rate": 0.25},
        "accuracy_within": {"28": 0.0, "56": 0.125, "112": 0.5, "1120": 0.6},
        **{"mean_length": 104.5, "mean_correct_length": 98.0, "median_correct_length": 96.5},
        "tokens_per_correct": 1174.2,
    },
    {
        **{"step": 1000, "avg_at_k": 0.0, "pass_at_k": {"1": 0.0}, "truncation_rate": 0.0},
        "accuracy_within": {"28": 0.0, "56": 0.0, "112": 0.0, "1120": 0.0},
        **{"mean_length": 61.0, "mean_correct_length": None, "median_correct_length": None},
        "tokens_per_correct": None,
    },
]


def test_lengths_and_where_they_fell(run_dir: Path) -> None:
    more = {"evaluations": EVALUATIONS, "shortenings": [{"step": 1000, "note": "the <b> fell"}]}
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | more))
    page = write_report(run_dir).read_text()
    text = text_of(page)
    assert "Shorter completions the <b> fell." in text
    headings = re.findall(r'<th scope="col">([^<]*)</th>', page.split("</table>")[0])
    assert headings == [
        "step",
        *(f"correct within {budget} tokens" for budget in ("28", "56", "112", "1,120")),
        "cut at the limit",
        "tokens, mean",
        "tokens if correct, mean",
        "tokens if correct, median",
        "tokens per correct answer",
    ]
    table = page.split('<table class="numbers">')[1].split("</table>")[0]
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    none = "\N{EN DASH}"
    assert rows == [
        ["20", "0.0%", "12.5%", "50.0%", "60.0%", "25.0%", "104", "98", "96", "1,174"],
        ["1,000", "0.0%", "0.0%", "0.0%", "0.0%", "0.0%", "61", none, none, none],
    ]
    assert "lengths" in parse(page).ids


def test_a_summary_without_lengths_is_shown_as_before(run_dir: Path) -> None:
    before = write_report(run_dir).read_text()
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"evaluations": EVALUATIONS[:1]}))
    assert write_report(run_dir).read_text() == before
    assert "length budget" not in before and "Shorter completions" not in before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accuracy_within": {"<b>": 0.5}}, "evaluations"),
        ({"accuracy_within": {"28": 1.5}}, "evaluations"),
        ({"mean_length": -1.0}, "evaluations"),
        ({"tokens_per_correct": "many"}, "evaluations"),
    ],
)
def test_lengths_that_are_none_are_refused(
    changes: dict[str, Any], said: str, run_dir: Path
) -> None:
    planted = SUMMARY | {"evaluations": [EVALUATIONS[1] | changes]}
    (run_dir / "summary.json").write_text(json.dumps(planted))
    with pytest.raises(ValueError, match=said):
        write_report(run_dir)


def test_rollout_shows_mask_anchors_and_tokens(run_dir: Path) -> None:
    tokens = ["so ", "<b>", "12", "\n"]
    columns = {
        "tokens": tokens,
        "token_kl": [0.0005, 0.02, 2.5, 0.001],
        "token_loss": [0.0005, 0.02, 0.06, -0.001],
        "student_entropy": [0.5, 0.25, 0.0, 1.0],
        "teacher_entropy": [0.25, 0.5, 0.0, 0.5],
        "selected": [False, True, False, False],
        "clipped_mass": [0.0, 0.0, 0.75, 0.0],
    }
    anchors = [{"text": "152", "found": True}, {"text": "760", "found": False}]
    sample = made_up_sample(3, correct=False, truncated=True, anchors=anchors, **columns)
    write_lines(run_dir / "samples.jsonl", [sample])
    page = write_report(run_dir).read_text()
    spans = re.findall(r'<span class="(k\d[^"]*)" data-v="([^"]+)">([^<]*)</span>', page)
    assert [css for css, _, _ in spans] == ["k0", "k3 sel", "k7", "k1"]
    assert [text for _, _, text in spans] == ["so ", "&lt;b&gt;", "12", "↵\n"]
    assert spans[1][1] == "KL 0.02 · loss 0.02 · H_S 0.25 · H_T 0.5 nats · R 2 · clipped mass 0"
    assert spans[2][1].endswith("R 0 · clipped mass 0.75")
    text = text_of(page)
    assert "✓ 152" in text and "✗ 760" in text and "1 of 2 anchors found" in text
    assert "✗ wrong" in text and "truncated" in text and "1 of 4 tokens selected" in text
    hidden = round(sample["mask_ratio"] * len(SOLUTION))
    assert f'<del class="hidden">{SOLUTION[-hidden:]}</del>' in page


def test_hostile_text_stays_text(run_dir: Path) -> None:
    hostile = (
        "</div></main><script>alert(1)</script><img src=x onerror=alert(1)>\" '{{ 7 * 7 }}\ud800"
    )
    sample = made_up_sample(
        1,
        problem=hostile,
        problem_id=hostile,
        solution=hostile,
        partial_solution=hostile,
        answer=hostile,
        anchors=[{"text": hostile, "found": False}],
    )
    sample["tokens"][0] = hostile
    write_lines(run_dir / "samples.jsonl", [sample])
    config = f"[model]\nname_or_path = {json.dumps(hostile[:-1])}\n"
    (run_dir / "config.toml").write_text(config)
    page = write_report(run_dir).read_text()
    assert not {tag for tag, _ in parse(page).elements} & {"script", "img"}
    assert page.count("{{ 7 * 7 }}") == 8
    assert "Verified solution; the teacher saw all of it" in page


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ("summary.json", "The run has not finished"),
        ("metrics.jsonl", "No training step is recorded"),
        ("samples.jsonl", "No rollout was kept"),
        ("config.toml", "There is no config.toml"),
    ],
)
def test_report_says_what_is_missing(run_dir: Path, lacking: str, sentence: str) -> None:
    (run_dir / lacking).unlink()
    text = text_of(write_report(run_dir).read_text())
    assert text.count("Missing from this run") == 1
    assert sentence in text


def test_interrupted_run(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    metrics = made_up_metrics(3)
    lines = [json.dumps(entry) for entry in metrics]
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:40]]))
    text = text_of(write_report(run_dir).read_text())
    assert "3 of 40" in text
    assert f"{sum(entry['seconds'] for entry in metrics):.1f} s" in text


def test_run_without_evaluation(run_dir: Path) -> None:
    unmeasured = {key: None for key in SUMMARY if key.startswith(("avg", "pass", "paired"))}
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | unmeasured))
    text = text_of(write_report(run_dir).read_text())
    assert "Accuracy was not measured" in text and "Avg@12 on" not in text
    only_after = unmeasured | {"avg_at_k_after": 0.5}
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | only_after))
    text = text_of(write_report(run_dir).read_text())
    assert "Avg@12 on 128 problems, after training 50.0%" in text


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains none of .*; needs a run directory; give"):
        write_report(tmp_path)


def test_long_run_stays_small(run_dir: Path) -> None:
    metrics = made_up_metrics(40)
    write_lines(run_dir / "metrics.jsonl", [metrics[i % 40] | {"step": i + 1} for i in range(5000)])
    base = made_up_sample(1)
    columns = ("tokens", "token_loss", "token_kl", "student_entropy", "teacher_entropy")
    long = {key: (base[key] * 40)[:4000] for key in (*columns, "selected", "clipped_mass")}
    write_lines(run_dir / "samples.jsonl", [base | long for _ in range(8)])
    path = write_report(run_dir)
    assert path.stat().st_size < 2_000_000
    page = path.read_text()
    assert page.count("data-v=") == MAX_SAMPLES * MAX_TOKENS
    assert "The page shows the first 800 of 4,000 tokens." in page
    assert "each point is the mean of 13 steps" in page


def test_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_dir)])
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    with pytest.raises(SystemExit):
        main([str(run_dir / "nowhere")])
    assert "nowhere is not a directory; needs a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ('model = "org/strong"\nmodels = []', "teacher <b>org/strong</b>"),
        (
            'model = "none"\nmodels = ["org/one", "org/<two>"]',
            "teacher <b>org/one, org/&lt;two&gt;</b>",
        ),
        ('url = "http://a:1"\nserved_model = "org/served"', "teacher <b>org/served</b>"),
        ('model = "none"\nmodels = []\nserved_model = "none"', None),
    ],
)
def test_the_page_says_which_models_were_the_teachers(
    lines: str, shown: str | None, run_dir: Path
) -> None:
    (run_dir / "config.toml").write_text(f'{CONFIG}\n[teacher]\nweights = "external"\n{lines}\n')
    page = write_report(run_dir).read_text()
    assert shown in page if shown else "<span>teacher <b>" not in page
