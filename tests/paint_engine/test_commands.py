"""The commands: what they answer before PyTorch is imported, and without the engine's
libraries."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paint_engine import ENGINE_LIBRARIES

# The command with these arguments; then whether it has imported what takes seconds.
PROGRAM = """
import importlib, sys

command, *arguments = sys.argv[1:]
code = 0
try:
    importlib.import_module(f"paint_engine.{command}").main(arguments)
except SystemExit as stop:
    code = stop.code
slow = {"torch", "transformers", "peft", "datasets", "numpy", "matplotlib"} & set(sys.modules)
print(f"\\nexit code {code or 0}, imported: {sorted(slow)}")
"""


def answer(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "--help"), 0, "--optim.learning_rate"),
        (("train", "--print-config"), 0, "[optim]"),
        (("train", "--optim.lr", "1"), 2, "unknown key 'optim.lr'"),
        (("train", "--train.num_steps", "-1"), 2, "train.num_steps: got -1"),
        (("train", "--preset", "tinny"), 2, "needs one of grpo-paint-qwen3-1.7b"),
        (("train", "--config", "missing.toml"), 2, "missing.toml: no such file"),
        (("train", "--resume", "nowhere"), 2, "no config.toml there"),
        (("evaluate", "--help"), 0, "--benchmarks"),
        (("evaluate", "--benchmarks", "tiny", "--temprature", "1"), 2, "mean --temperature?"),
        (
            ("evaluate", "--model", "tiny", "--benchmarks", "tiny", "--top-p", "0"),
            2,
            "--top-p: got 0.0",
        ),
        (("evaluate", "--benchmarks", "aime2024"), 2, "did you mean aime24?"),
        (("evaluate", "--benchmarks", "tiny"), 2, "got neither --model nor --adapter"),
        (("evaluate", "compare", "--help"), 0, "RUN_A"),
        (("export", "--help"), 0, "OUTPUT_DIR"),
        (("export", "nowhere", "out"), 2, "nowhere: no such directory"),
        (("export", "a", "b", "--dtype", "int8"), 2, "invalid choice: 'int8'"),
        (("report.__main__", "--help"), 0, "run_dir"),
        (("report.__main__", "nowhere"), 2, "nowhere is not a directory"),
    ],
)
def test_an_answer_that_needs_no_model_imports_no_torch(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    printed = answer(*arguments)
    assert said in printed
    assert f"exit code {code}, imported: []" in printed
    assert "Traceback" not in printed


WITHOUT = """
import importlib.util, runpy, sys

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name in {missing!r} else found(name, package)
)


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Missing())
sys.argv = ["command", "--help"]
runpy.run_module("paint_engine.{command}", run_name="__main__")
"""


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "report"])
def test_without_the_engine_s_libraries_a_command_says_what_to_install(command: str) -> None:
    program = WITHOUT.format(missing=set(ENGINE_LIBRARIES), command=command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the engine needs {', '.join(ENGINE_LIBRARIES)}, not installed here: run pip "
        "install '.[engine]' in the clone\n"
    )


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    printed = answer("report.__main__", str(tmp_path))
    assert "imported: ['matplotlib', 'numpy']" in printed
    assert (tmp_path / "report.html").exists()


def test_the_libraries_are_those_of_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = [re.match(r"[\w-]+", line) for line in project["optional-dependencies"]["engine"]]
    assert {name[0].replace("-", "_") for name in extra if name} == set(ENGINE_LIBRARIES)
    base = [re.match(r"[\w-]+", line) for line in project["dependencies"]]
    assert [name[0] for name in base if name] == ["torch", "triton"]
