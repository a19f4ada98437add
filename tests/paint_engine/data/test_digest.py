"""A run's data is recognised when it is resumed: any edit of a used row is, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paint_engine.config.schema import Config
from paint_engine.config.toml import to_toml
from paint_engine.data.digest import check_same_data, data_record, write_data_record
from paint_engine.data.problem_sets import ProblemSet
from paint_engine.files import CONFIG_FILE
from paint_engine.types import Problem

CONFIG = Config()


def problems(count: int) -> list[Problem]:
    return [Problem(f"a.jsonl:{i}", f"How many? {i}", f"It is {i}.", str(i)) for i in range(count)]


def set_of(rows: list[Problem]) -> ProblemSet:
    return ProblemSet(tuple(rows), ((1,),) * len(rows), 0)


def compare(
    run_dir: Path,
    rows: list[Problem],
    evaluated: list[Problem] | None = None,
    config: Config = CONFIG,
    *,
    allow: bool = False,
) -> list[str]:
    said: list[str] = []
    sets = (set_of(rows), {} if evaluated is None else {"tiny": set_of(evaluated)})
    record = data_record(config, *sets)
    check_same_data(run_dir, record, sets, allow_changed=allow, say=said.append)
    write_data_record(run_dir, record)
    return said


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_FILE).write_text(to_toml(CONFIG))
    sets = (set_of(problems(5)), {"tiny": set_of(problems(3))})
    write_data_record(tmp_path, data_record(CONFIG, *sets))
    return tmp_path


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 63), field=st.sampled_from(["problem", "solution", "answer"]))
def test_an_edit_of_any_row_is_refused_and_the_row_is_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, field: str
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / CONFIG_FILE).write_text(to_toml(CONFIG))
    rows = problems(64)
    assert compare(run_dir, rows) == []
    rows[place] = replace(rows[place], **{field: "\ud800 7"})
    with pytest.raises(ValueError, match=rf"differs is number {place + 1} \(a.jsonl:{place}\)"):
        compare(run_dir, rows)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [replace(row, feedback="Hm." * (i == 2)) for i, row in enumerate(problems(5))],
            r"differs is number 3 \(a.jsonl:2\)",
        ),
        (problems(4), "has 4 rows .* had 5 for the run .*after number 4 are missing"),
        (problems(7), "has 7 rows .*the rows after number 5 are new"),
        (problems(5)[::-1], r"differs is number 1 \(a.jsonl:4\)"),
        (problems(6)[1:], r"differs is number 1 \(a.jsonl:1\)"),
    ],
    ids=["feedback", "fewer", "more", "another order", "one exchanged"],
)
def test_rows_that_came_or_went_are_counted(
    rows: list[Problem], expected: str, run_dir: Path
) -> None:
    with pytest.raises(ValueError, match=f"the training data tiny .*{expected}.*--allow-changed"):
        compare(run_dir, rows, problems(3))
    (said,) = compare(run_dir, rows, problems(3), allow=True)
    assert "resuming with changed data" in said
    # What was accepted is the run's data from now on.
    assert compare(run_dir, rows, problems(3)) == []


def test_evaluation_data_may_be_selected_otherwise_but_not_change(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="the evaluation data tiny has 2 rows"):
        compare(run_dir, problems(5), problems(2))
    fewer = CONFIG.model_copy(update={"eval": CONFIG.eval.model_copy(update={"num_problems": 2})})
    assert compare(run_dir, problems(5), problems(2), fewer) == []
    assert json.loads((run_dir / "data.json").read_text())["eval"]["num_rows"] == 2
    assert compare(run_dir, problems(5), None) == []


def test_each_benchmark_has_its_record(run_dir: Path) -> None:
    """An evaluation on another list of them is no change of the data; an edit of one is."""
    rows, names = problems(5), ("aime24", "mine=mine.jsonl")
    config = CONFIG.model_copy(
        update={"eval": CONFIG.eval.model_copy(update={"benchmarks": names})}
    )
    sets = {"aime24": set_of(problems(3)), "mine": set_of(problems(2))}
    said: list[str] = []

    def resume(held_out: dict[str, ProblemSet], now: Config = config) -> None:
        record = data_record(now, set_of(rows), held_out)
        check_same_data(
            run_dir, record, (set_of(rows), held_out), allow_changed=False, say=said.append
        )
        write_data_record(run_dir, record)

    resume(sets)
    recorded = json.loads((run_dir / "data.json").read_text())
    assert {name: one["num_rows"] for name, one in recorded["benchmarks"].items()} == {
        "aime24": 3,
        "mine": 2,
    }
    assert recorded["benchmarks"]["mine"]["selection"]["path"] == "mine.jsonl"
    assert "eval" not in recorded
    resume(sets)
    edited = [*problems(1), replace(problems(2)[1], answer="7")]
    with pytest.raises(ValueError, match=r"the evaluation data mine.jsonl has 2 rows .*number 2"):
        resume(sets | {"mine": set_of(edited)})
    other = CONFIG.eval.model_copy(update={"benchmarks": ("aime24", "mine=other.jsonl")})
    resume(sets | {"mine": set_of(edited)}, CONFIG.model_copy(update={"eval": other}))
    assert said == []
    recorded["benchmarks"]["mine"]["digest"] = 3
    (run_dir / "data.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"benchmarks.mine.digest"):
        resume(sets)


def test_without_a_record_another_path_is_refused(run_dir: Path) -> None:
    (run_dir / "data.json").unlink()
    assert compare(run_dir, problems(5)) == []
    (run_dir / "data.json").unlink()
    other = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"path": "b.jsonl"})})
    with pytest.raises(ValueError, match=r"training data is b.jsonl, and was tiny; no digest"):
        compare(run_dir, problems(5), config=other)


def test_a_row_that_goes_to_another_teacher_has_changed(run_dir: Path) -> None:
    """Rows without one have the digests of earlier versions."""
    rows = problems(5)
    assert compare(run_dir, rows) == []
    routed = [replace(row, route="math") for row in rows]
    with pytest.raises(ValueError, match=r"row that differs is number 1 \(a.jsonl:0\)"):
        compare(run_dir, routed)
    write_data_record(run_dir, data_record(CONFIG, set_of(routed), {}))
    assert compare(run_dir, routed) == []
    with pytest.raises(ValueError, match=r"row that differs is number 3 \(a.jsonl:2\)"):
        compare(run_dir, [*routed[:2], replace(routed[2], route="code"), *routed[3:]])
    # A text of feedback is no name of a teacher.
    with pytest.raises(ValueError, match=r"row that differs is number 1 \(a.jsonl:0\)"):
        compare(run_dir, [replace(row, feedback="math") for row in rows])
