"""Writes `locks/`: every package that CI installs, with the hashes of all its published files; and
`constraints-gpu.txt`: every version of a GPU node.

`make lock` runs it. Versions are decided in `constraints.txt` and the `requirements-*.txt`, and
nowhere else; uv fills in what those leave open, for every platform and Python of the project, from
the registry that uv is configured with.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from resolve import GPU, PYTHONS, compiled, versions

ROOT = Path(__file__).parents[1]

HEADER = """\
# {what}
# Written by `make lock` from pyproject.toml, constraints.txt and requirements-*.txt: change those.
# Only wheels are installed, so that no package's setup.py runs.
--only-binary :all:
"""

# PyTorch's own index has builds for CPUs, which no other registry lists. Their hashes are those of
# `pip download --no-deps torch==VERSION+cpu` and `pip hash FILE`. This one is for Python 3.11 on
# Linux, x86_64; where it does not fit, the build of locks/torch.txt is installed.
TORCH_CPU = {"2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"]}

GPU_HEADER = """\
# Every version of a GPU node: x86-64 Linux with glibc 2.31 or newer, Python 3.11 to 3.13.
# Written by `make lock` from pyproject.toml and requirements-vllm.txt: change those."""

# Release 12 has files of its own in `cuda/bindings`, where those of cuda-bindings 13 belong.
GPU_BOUNDS = ["cuda-python>=13"]

# What a build of PyTorch decides: its version, the compiler of its kernels, CUDA's libraries.
OF_TORCH = re.compile(r"(torch|triton|(nvidia|cuda)-.*)==")


def pins(file: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    return [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def package(requirement: str) -> str:
    """The normalised name in a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def resolve(requirements: list[str], constraints: list[str], *options: str) -> list[str]:
    """One entry per package that `requirements` need: version, platforms and hashes."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--constraints", file.name]
        command += ["--universal", "--python-version", "3.11", "--only-binary", ":all:"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet", *options]
        text = "\n".join(requirements)
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
    return re.split(r"^(?=\w)", done.stdout, flags=re.MULTILINE)[1:]


def gpu_versions() -> set[str]:
    """What a GPU node installs: vLLM's own pins, and otherwise the versions that its build for CPUs
    is tested with (`requirements-vllm.txt`)."""
    found: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        chosen, constraints = Path(folder, "chosen.txt"), Path(folder, "constraints.txt")
        for python in PYTHONS:
            # uv keeps the versions of a file that it writes anew, where they are possible.
            chosen.write_text("\n".join(pins("requirements-vllm.txt")))
            constraints.write_text("\n".join([*GPU_BOUNDS, *found]))
            done = compiled(GPU, python, constraints, "--output-file", str(chosen))
            if done.returncode:
                raise SystemExit(done.stderr)
            found |= versions(chosen.read_text())
    return found


def of_dev(extras: dict[str, list[str]]) -> list[str]:
    """What the extra "dev" needs, with what the other extras need that it names."""
    itself, *needed = extras["dev"]
    names = re.fullmatch(r"paint-engine\[([\w,]+)\]", itself)
    assert names is not None, itself
    return [*needed, *(one for name in names[1].split(",") for one in extras[name])]


def write(name: str, what: str, entries: list[str]) -> None:
    (ROOT / "locks" / name).write_text(HEADER.format(what=what) + "".join(sorted(entries)))
    print(f"locks/{name}: {len(entries)} packages")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    needed = [*project["dependencies"], *of_dev(extras), *build]
    constraints = pins("constraints.txt")

    entries = resolve(needed, constraints)
    write(
        "dev.txt",
        "The environment of `make test` and `make lint`, but for PyTorch.",
        [entry for entry in entries if not OF_TORCH.match(entry)],
    )
    write(
        "torch.txt",
        "PyTorch as registries have it: on Linux the build for GPUs, with its libraries.",
        [entry for entry in entries if OF_TORCH.match(entry)],
    )

    (torch,) = [pin.split("==")[1] for pin in constraints if package(pin) == "torch"]
    if torch not in TORCH_CPU:
        raise SystemExit(
            f"no hash is known of torch {torch}+cpu: add it to TORCH_CPU in .ci/lock.py"
        )
    hashes = [f"--hash=sha256:{digest}" for digest in TORCH_CPU[torch]]
    triton = [line for line in needed if package(line) == "triton"]
    write(
        "torch-cpu.txt",
        "PyTorch for CPUs, where an index offers it.",
        [" \\\n    ".join([f"torch=={torch}+cpu", *hashes]) + "\n", *resolve(triton, constraints)],
    )

    vllm = pins("requirements-vllm.txt")
    write(
        "vllm.txt",
        "The environment of `make test-vllm`, but for PyTorch.",
        resolve(vllm, [], "--no-deps"),
    )

    old = pins("requirements-transformers4.txt")
    others = [pin for pin in constraints if package(pin) not in {package(pin) for pin in old}]
    write("transformers4.txt", "What `make test-transformers4` installs.", resolve(old, others))

    found = sorted(gpu_versions())
    (ROOT / GPU.constraints).write_text("\n".join([GPU_HEADER, *found, ""]))
    print(f"{GPU.constraints}: {len(found)} packages")


if __name__ == "__main__":
    main()
