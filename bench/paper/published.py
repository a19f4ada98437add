"""The figures in the paper's Tables 1 to 4 (arXiv 2604.26573): Avg@12 in percent."""

TABLE_1: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "Qwen3-1.7B": {
        "base": (51.5, 36.7, 23.1, 37.1),
        "sft": (48.4, 36.3, 22.7, 35.8),
        "grpo": (51.1, 38.3, 23.7, 37.7),
        "opsd": (57.2, 43.9, 29.2, 43.4),
        "paint": (59.7, 44.2, 29.7, 44.5),
    },
    "Qwen3-4B": {
        "base": (74.9, 66.4, 42.2, 61.2),
        "sft": (70.2, 62.3, 43.4, 58.6),
        "grpo": (75.6, 68.1, 44.4, 62.7),
        "opsd": (76.4, 68.3, 46.1, 63.6),
        "paint": (76.9, 69.7, 46.7, 64.4),
    },
    "Qwen3-8B": {
        "base": (75.8, 65.6, 43.9, 61.8),
        "sft": (72.3, 64.2, 42.9, 59.8),
        "grpo": (76.4, 68.9, 46.7, 64.0),
        "opsd": (77.8, 70.8, 45.8, 64.8),
        "paint": (79.2, 72.2, 49.4, 66.9),
    },
}
"""by backbone, smallest first, and setting: AIME 2024, AIME 2025, HMMT 2025 and their mean"""

ABLATIONS: dict[int, dict[str, float]] = {
    2: {
        "rho-0.00-0.00": 57.2,
        "rho-0.25-0.25": 57.8,
        "rho-0.50-0.50": 56.9,
        "rho-0.75-0.75": 55.8,
        "rho-0.50-0.25": 58.1,
        "rho-0.50-0.30": 57.8,
        "rho-0.40-0.30": 58.6,
    },
    3: {
        "place-prefix": 56.1,
        "place-middle": 57.8,
        "place-random": 57.2,
        "rho-0.40-0.30": 58.6,
    },
    4: {
        "rho-0.40-0.30": 58.6,
        "blend-0.01-1.00": 58.6,
        "blend-0.03-1.00": 58.9,
        "blend-0.05-1.00": 57.8,
        "blend-0.03-0.01": 59.2,
        "paint": 59.7,
        "blend-0.03-0.05": 58.9,
    },
}
"""AIME 2024 of Qwen3-1.7B by table and setting; the paper has no placement at sentence ends"""


def paper_difference(table: int, panel: int, setting: str, reference: str) -> float | None:
    """Returns the difference of two rows of the paper in points; None if the paper lacks one of
    them.

    Table 1 compares macro averages, the others AIME 2024.

    panel: index of the backbone in Table 1, 0 for the smallest.
    """
    if table == 1:
        macro = {row: values[-1] for row, values in list(TABLE_1.values())[panel].items()}
    else:
        macro = ABLATIONS.get(table, {})
    if setting not in macro or reference not in macro:
        return None
    return macro[setting] - macro[reference]
