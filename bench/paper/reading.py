"""How to read the tables, and what they do not show, as Markdown."""

from bench.paper.plan import PAPER
from bench.tables import Result

READING = """\
All rows of a table start from the same base and take the same number of steps with the same number
of rollouts (solutions for SFT).

- *last*: accuracy on held-out problems after the last step, mean over seeds. The paper
  reports best checkpoints; here none is chosen.
- *s.d. of seeds*: standard deviation of the seeds' last accuracies.
- A difference is between last accuracies, in points, with its 95% interval. It is taken on each
  problem and each seed that both rows have, so where one row has more seeds, it is not the
  difference of the two means.
- *verdict*: "above" or "below" if the interval excludes 0, else "within noise": these runs cannot
  tell the two apart, which does not make them equal.
- *seeds above*: number of seeds in which the row's last accuracy is higher, and in which both are
  equal."""
READING_PAPER = """
- *paper*: the paper's figures, for other models and problems and without intervals. Compare sign
  and order, not size."""


LIMITS = """\
**What the tables show:** whether each recipe, with its preset and at an equal budget, improves a
small model that makes slips, which of the paper's differences appear on it, and how large a
difference must be to be detected here.

**What they do not show:** which row is best on competition mathematics.

- {models}, and the problems are word problems of one domain.
- The base's slips are learned: it was pretrained on a writer who slips more where he works alone
  than where a reference confirms a result. Recipes unlearn them. Large models may err
  for other reasons.
- The two ways to an answer, and how strongly a reference draws to its own, are built in: the more
  of it the base sees, the likelier it goes that way (docs/decisions.md, "The tiny base"). What a
  mask does to the teacher is therefore chosen; the tables show what the student takes from it.
- Another problem's reference draws the base to its way and confirms none of its results. So the
  teacher has nothing to gain from one, by design.
- The base has seen references with a hidden end more often than others. A start or a middle was
  hidden only where a random part was.
- No test problem has the arithmetic of a training problem, or of a pretraining problem in the same
  family of stories. Fewer than 1% have that of a pretraining problem in another family. The plan
  says that none has.
- The base was chosen by its properties on the first 512 of the test problems. The rows share this
  base and these problems.
- OPSD and PAINT are bounded by their teacher, the base with a solution in its prompt. Recipes that
  reach it cannot be told apart.
- SFT learns from terse solutions without slips or checks, all of one way. The base writes longer
  ones, and checks some of its results.
- Equal rollouts are not equal problems: {grouped} 8 rollouts on each problem, {groups} problems a
  step where the others see {batch}.
- Each learning rate was chosen from a coarse grid, and the intervals ignore this choice. If the
  chosen rate is at the grid's edge, a better one may lie outside.
"""
LIMITS_OF_ABLATIONS = """\
- Tables 2 to 4 use PAINT's rate in every row, which favours its default. The row of Table 2 that
  hides nothing is OPSD at PAINT's rate, which may differ from OPSD's rate in Table 1.
"""
LIMITS_OF_TEACHERS = """\
- The stronger teacher of Table 5 is the base after more steps on solutions without slips. It is
  closer to the base than a larger model would be. The base was not taught the message that shows a
  sibling.
"""
LIMITS_OF_CLIP = """\
- Table 6 uses PAINT's rate in every row. It was chosen with the clip and the problem's own
  solution, which favours that row. Without the clip another rate may be better.
"""
INTERVALS = """\
- Answers are sampled at temperature {temperature:g} and top-p {top_p:g}. They have up to
  {max_new_tokens} tokens.

**The intervals** are those of a mean with errors that cluster by seeds and by problems, with
Student's t of as many degrees of freedom as the rows share seeds, less one. They are too wide where
seeds hardly differ (bench/paper/stats.py). The claims are corrected for their number; the verdicts
in the tables are not, and one of twenty would be wrong if all rows were equal."""


def has_paper_tables(result: Result) -> bool:
    return any(panel["table"] in PAPER for panel in result["tables"])


def reading_text(result: Result) -> str:
    return READING + READING_PAPER * has_paper_tables(result)


def limits_text(result: Result) -> str:
    """Returns a text on what the tables show and do not show, and how long they took."""
    sizes = [f"{base['num_parameters'] / 1e6:.1f}" for base in result["bases"]]
    scale, numbers = result["scale"], {panel["table"] for panel in result["tables"]}
    one = f"The model has {sizes[0]} million parameters"
    several = f"The models have {' and '.join(dict.fromkeys(sizes))} million parameters"
    text = (
        LIMITS
        + LIMITS_OF_ABLATIONS * (not numbers.isdisjoint((2, 3, 4)))
        + LIMITS_OF_TEACHERS * (5 in numbers)
        + LIMITS_OF_CLIP * (6 in numbers)
        + INTERVALS
    ).format(
        models=one if len(set(sizes)) == 1 else several,
        grouped="GRPO and SDPO spend" if 5 in numbers else "GRPO spends",
        groups=scale["batch_size"] // 8,
        batch=scale["batch_size"],
        **result["sampling"],
    )
    return f"{text}\n\n{time_text(result)}"


def time_text(result: Result) -> str:
    """Returns the time of all runs and their failures, as text."""
    seconds, workers = result["seconds"], result["num_workers"]
    hours = sum(seconds.values()) / 3600
    rates = seconds["learning_rates"] / 3600
    failed = ", ".join(result["failed"])
    failures = f"Failed, and repeated with the same seed: {failed}." if failed else "No run failed."
    return (
        f"**Time:** {result['num_runs']} runs took {hours:.1f} hours on one processor core, "
        f"{rates:.1f} of them for the learning rates. With {workers} cores that is "
        f"{60 * hours / workers:.0f} minutes. The pretraining of the bases is not counted. "
        f"{failures}"
    )
