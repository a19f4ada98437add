"""The hours of the presets for Qwen3: the settings that they rest on, and the table."""

from bench.hours import HOUR_S, hours_table, predict
from paint_engine.estimate.hours import BANDWIDTH_SHARE, FLOPS_SHARE, GPUS


def test_the_row_of_a_preset_has_its_steps_and_its_evaluations() -> None:
    row = predict("paint", "qwen3-1.7b")
    assert (row["num_steps"], row["num_rollouts"], row["max_new_tokens"]) == (100, 32, 1024)
    # Every 20 steps and at the start; 30 problems, 12 answers each.
    assert (row["num_evaluations"], row["num_answers"]) == (6, 360)
    assert row["max_answer_tokens"] == 38_912
    # Scoring, the student's forward and its backward pass: 2 operations a weight and token each, of
    # at least 1.4e9 weights.
    passes_s = 3 * 2 * 1.4e9 * 100 * 32 * 1024 / (8 * FLOPS_SHARE * GPUS["h100"].flops_per_s)
    # Each GPU reads the weights, 2 bytes each of 1.7e9, once a token.
    reads_s = 2 * 1.7e9 * 100 * 1024 / (BANDWIDTH_SHARE * GPUS["h100"].bytes_per_s)
    assert passes_s + reads_s < row["training_h"] * HOUR_S < 1.5 * (passes_s + reads_s)
    assert row["evaluations_h"] > row["training_h"]


def test_the_table_has_the_hours_of_one_evaluation() -> None:
    rows = [{**predict("grpo", "qwen3-1.7b"), "training_h": 7.0, "evaluations_h": 5.5}]
    assert rows[0]["num_evaluations"] == 11
    table = hours_table(
        {
            "gpu": "h100",
            "num_gpus": 8,
            "student_prompt": 150,
            "teacher_prompt": 900,
            "rows": rows,
            "command": "python -m bench.hours",
        }
    )
    assert "| `grpo-qwen3-1.7b` | 500 | 16,000 | 7.00 | 11 | 5.5 | 0.5 |" in table
    assert "A prediction, not a measurement: 32 rollouts a step" in table
