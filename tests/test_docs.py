"""The documents name the files, functions, commands and figures that there are."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from paint_engine.config.command_line import load_config

ROOT = Path(__file__).parents[1]
PACKAGES = ("paint_kernels", "paint_engine", "bench")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

ALONE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
"""
# Of the extra `engine`, what a stray import is most likely to reach.
ENGINE_LIBRARIES = {
    *("paint_engine", "transformers", "peft", "datasets", "pydantic", "jaxtyping", "rich"),
    *("safetensors", "huggingface_hub", "matplotlib", "jinja2", "math_verify", "pyarrow"),
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def files_of_the_tree() -> set[str]:
    """The paths of the tree in docs/architecture.md, from its lines' indentation."""
    found, folders = set(), []
    for line in blocks(ARCHITECTURE.split("## The layers")[0], "text")[0].splitlines():
        if not line:
            continue
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.add("".join([*folders, name]))
    return found


def test_the_tree_names_every_python_file_and_no_other() -> None:
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    there = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    named = files_of_the_tree()
    assert not there - named, "docs/architecture.md lacks these files"
    assert not named - there, "docs/architecture.md names files that are not there"


def definitions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_the_paths_name_functions_that_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", ARCHITECTURE)
    assert len(named) > 20
    for file, names in named:
        paths = [ROOT / package / file for package in PACKAGES]
        there = set().union(*(definitions(path) for path in paths if path.exists()))
        assert set(re.findall(r"\w+", names)) <= there, file


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500


def test_the_readme_s_loss_runs_with_pytorch_alone() -> None:
    example = blocks(README, "python")[0]
    assert len(example.strip().splitlines()) <= 15
    program = ALONE.format(others=ENGINE_LIBRARIES) + example
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.match(r"loss 0\.\d+, KL 0\.\d+ nats per token\n10 interpolated", done.stdout)


def test_the_readme_s_figures_of_the_loss_are_measured() -> None:
    result = json.loads((ROOT / "bench" / "results" / "kernels-cpu.json").read_text())
    figures = f"{result['time_ratio']:.2f} of plain PyTorch's time and "
    figures += f"{result['memory_ratio']:.2f} of its extra memory"
    assert figures in " ".join(README.split())


def heading_slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in heading_slugs(path.read_text()), target


def training_commands(text: str) -> list[str]:
    """The arguments of each `paint_engine.train` in the shell blocks, lines joined."""
    shell = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    found = re.findall(r"-m paint_engine\.train ([^\n>]*)", shell)
    return [arguments for arguments in found if "--resume" not in arguments]


@pytest.mark.parametrize(
    "arguments",
    [
        line
        for name in ("README.md", "docs/cluster.md")
        for line in training_commands((ROOT / name).read_text())
    ],
)
def test_training_commands_parse(arguments: str) -> None:
    assert load_config(shlex.split(arguments, comments=True)).config is not None


def test_the_citation_names_the_paper_and_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and str(citation["version"]) == VERSION
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Tan", "Hong"]
    assert paper["title"] in " ".join(README.split())
    assert f"arxiv.org/abs/{paper['identifiers'][0]['value'].removeprefix('arXiv:')}" in README


def test_the_changelog_has_this_version() -> None:
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_are_the_linters_of_make() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]] == commands


def test_the_workflow_runs_what_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert job["timeout-minutes"]
