"""Whether the project's two installations resolve: a laptop's by `constraints.txt`, a GPU node's by
`constraints-gpu.txt`.

`make resolve` asks the registry that uv is configured with, for every Python of the project. It
downloads metadata alone. It fails with what conflicts, and with a package that a whole set lacks.
If no registry answers, it says so and checks nothing.
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# What uv exits with if it was not able to ask, as opposed to an answer that does not resolve (1).
NOT_ASKED = 2


@dataclass(frozen=True)
class Installation:
    """What `pip install --constraint CONSTRAINTS '.[EXTRAS]'` installs.

    platform: as uv's --python-platform names it.
    whole: whether the constraints name every package that is installed.
    """

    constraints: str
    extras: tuple[str, ...]
    platform: str
    whole: bool


# Builds of torch decide the versions of CUDA's libraries, which constraints.txt leaves out.
LAPTOP = Installation("constraints.txt", ("engine", "dev"), "x86_64-manylinux_2_28", whole=False)
# llguidance, which vLLM needs, has wheels for glibc 2.31 and newer; tilelang none for this glibc on
# ARM.
GPU = Installation("constraints-gpu.txt", ("engine", "vllm"), "x86_64-manylinux_2_31", whole=True)


def compiled(
    installation: Installation, python: str, constraints: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """uv's choice of a version for each package, from wheels alone."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
    for extra in installation.extras:
        command += ["--extra", extra]
    command += ["--constraints", str(constraints), "--python-version", python]
    command += ["--python-platform", installation.platform, "--only-binary", ":all:"]
    command += ["--no-python-downloads", "--no-header", "--no-annotate", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def versions(text: str) -> set[str]:
    """The lines NAME==VERSION of a requirements file, with normalised names."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}" for name, version in found}


def unanswered() -> str | None:
    """uv's message if no registry answers, for a package that every registry has."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--no-deps", "--no-cache"]
    done = subprocess.run(command, input="packaging", capture_output=True, text=True)
    return done.stderr if done.returncode == NOT_ASKED else None


def fault(installation: Installation, python: str) -> str | None:
    """What is wrong with an installation, or None."""
    file = ROOT / installation.constraints
    done = compiled(installation, python, file)
    if done.returncode == NOT_ASKED:
        print(f"resolve: {file.name}, Python {python}: SKIPPED:\n{done.stderr}")
        return None
    if done.returncode:
        return done.stderr
    lacking = versions(done.stdout) - versions(file.read_text()) if installation.whole else set()
    return f"{file.name} lacks {', '.join(sorted(lacking))}: `make lock`\n" if lacking else None


def main() -> int:
    message = unanswered()
    if message is not None:
        print(f"resolve: SKIPPED, no registry can be reached:\n{message}")
        return 0
    asked = [(installation, python) for installation in (LAPTOP, GPU) for python in PYTHONS]
    # Each waits for the network for most of its time.
    with ThreadPoolExecutor(max_workers=len(asked)) as pool:
        faults = list(pool.map(lambda pair: fault(*pair), asked))
    for (installation, python), found in zip(asked, faults, strict=True):
        what = f"{installation.constraints}, '.[{','.join(installation.extras)}]', Python {python}"
        print(f"resolve: {what}: {'resolves' if found is None else f'FAILS:{chr(10)}{found}'}")
    return int(any(faults))


if __name__ == "__main__":
    sys.exit(main())
