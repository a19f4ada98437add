"""Training data: rows of files and data sets become problems, and problems become the requests of
each step."""

from paint_engine.data.digest import check_same_data, data_record, write_data_record
from paint_engine.data.problem_sets import (
    ProblemSet,
    batch_requests,
    held_out_notes,
    load_eval_sets,
    load_train_set,
    longest_answer,
    longest_sequence,
    spelled_note,
    step_requests,
)

__all__ = [
    "ProblemSet",
    "batch_requests",
    "check_same_data",
    "data_record",
    "held_out_notes",
    "load_eval_sets",
    "load_train_set",
    "longest_answer",
    "longest_sequence",
    "spelled_note",
    "step_requests",
    "write_data_record",
]
