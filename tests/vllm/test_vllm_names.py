"""Every name of vLLM that paint_engine uses is there: modules, members of its objects, keywords of
its calls, arguments of the engine, variables of the environment. The names are read from the code.

Nothing is run, so that this also tells what breaks with a vLLM that has no build for CPUs.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest

PACKAGE = Path(__file__).parents[2] / "paint_engine"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CORE, BESIDE = "rollout/vllm_core.py", "rollout/vllm_engine.py"
WORKER = "vllm.v1.worker.gpu_worker.Worker"
RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"

# The vLLM objects that expressions hold in the functions of CORE and BESIDE, which no import tells.
LLM, ENGINE = "vllm.LLM", "vllm.v1.engine.llm_engine.LLMEngine"
HEADS = "vllm.model_executor.layers.vocab_parallel_embedding"
HELD = {
    ("load", "self._llm"): LLM,
    ("load", "self._llm.llm_engine"): ENGINE,
    ("load", "self._adapter"): "vllm.lora.request.LoRARequest",
    ("_put_in_place", "self._llm"): LLM,
    ("stream", "self._llm"): LLM,
    ("stream", "engine"): ENGINE,
    ("stream", "engine.renderer"): "vllm.renderers.base.BaseRenderer",
    ("stream", "output"): "vllm.outputs.RequestOutput",
    ("close", "llm"): LLM,
    ("close", "llm.llm_engine"): ENGINE,
    ("close", "llm.llm_engine.engine_core"): "vllm.v1.engine.core_client.EngineCoreClient",
    ("_repack_tied_head", "model"): "vllm.model_executor.models.qwen3.Qwen3ForCausalLM",
    ("_repack_tied_head", "head"): f"{HEADS}.ParallelLMHead",
    ("_repack_tied_head", "head.quant_method"): f"{HEADS}.UnquantizedEmbeddingMethod",
    ("_completion", "output"): "vllm.outputs.CompletionOutput",
    ("_completion", "flat"): "vllm.logprobs.FlatLogprobs",
    ("_gather", "get_tp_group()"): "vllm.distributed.parallel_state.GroupCoordinator",
}


def imported(tree: ast.AST) -> dict[str, str]:
    """What the imports of vLLM bind: the path of the object by its name in the code."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name: a.name for a in node.names if a.name.split(".")[0] == "vllm"}
    return found


def functions() -> Iterator[tuple[ast.FunctionDef, dict[str, str]]]:
    """Every function, with the paths of vLLM's objects by the expressions that hold them."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                own = {e: path for (name, e), path in HELD.items() if name == node.name}
                yield node, imported(node) | (own if file in (CORE, BESIDE) else {})


def members() -> dict[tuple[str, str], set[str]]:
    """The keywords that calls pass, by (path of the owner, member)."""
    found: dict[tuple[str, str], set[str]] = {}
    for function, held in functions():
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in held:
                found.setdefault((held[ast.unparse(node.value)], node.attr), set())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = held.get(ast.unparse(node.func.value))
                if owner is not None:
                    names = {word.arg for word in node.keywords if word.arg is not None}
                    found.setdefault((owner, node.func.attr), set()).update(names)
    return found


IMPORTED = sorted({path for tree in TREES.values() for path in imported(tree).values()})
MEMBERS = members()


def engine_arguments() -> set[str]:
    """The keys of `vllm.LLM(**llm_args)`."""
    found = set()
    for node in ast.walk(TREES[BESIDE]):
        if isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self._llm_args":
            assert isinstance(node.slice, ast.Constant)
            found.add(node.slice.value)
    return found


def variables() -> set[str]:
    """The environment variables of vLLM in the code's strings."""
    nodes = (node for tree in TREES.values() for node in ast.walk(tree))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {name for text in texts for name in re.findall(r"\bVLLM_[A-Z0-9_]+\b", text)}


def has(owner: object, name: str) -> bool:
    """Whether an object, or an instance of a class as its source is written, has the member."""
    if hasattr(owner, name) or not inspect.isclass(owner):
        return hasattr(owner, name)
    ours = [base for base in owner.__mro__ if base.__module__.split(".")[0] == "vllm"]
    assigned = re.compile(rf"\bself\.{name}\b[^=\n]*=[^=]")
    return any(
        name in vars(base).get("__annotations__", {}) or assigned.search(inspect.getsource(base))
        for base in ours
    )


def test_the_names_are_read_from_the_code() -> None:
    assert {"vllm.LLM", "vllm.v1.engine.exceptions.EngineDeadError"} <= set(IMPORTED)
    assert MEMBERS["vllm", "SamplingParams"] >= {"seed", "logit_bias", "flat_logprobs"}
    assert MEMBERS[ENGINE, "add_request"] == {"lora_request"}
    assert {"logprobs_mode", "enable_lora", "max_num_seqs", "tensor_parallel_size"} <= (
        engine_arguments()
    )


def test_every_object_of_vllm_is_named_here_and_used() -> None:
    """An object that is held deeper in a chain than HELD says would be checked by nobody."""
    used = set()
    for function, held in functions():
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if owner in held:
                used |= {(function.name, owner)} & HELD.keys()
            inside = [e for e in held if re.match(rf"{re.escape(e)}\W", owner)]
            assert owner in held or not inside, f"what is {owner} in {function.name}?"
    assert used == HELD.keys()


@pytest.mark.parametrize("path", IMPORTED)
def test_vllm_has_what_is_imported(path: str) -> None:
    assert resolve_name(path) is not None


@pytest.mark.parametrize(("owner", "member"), sorted(MEMBERS))
def test_vllm_s_objects_have_the_members(owner: str, member: str) -> None:
    there = resolve_name(owner)
    assert has(there, member)
    keywords = MEMBERS[owner, member]
    if keywords:
        parameters = inspect.signature(getattr(there, member)).parameters
        assert keywords <= parameters.keys()


def test_vllm_s_engine_takes_the_arguments() -> None:
    arguments = resolve_name("vllm.engine.arg_utils.EngineArgs")
    assert engine_arguments() <= {field.name for field in fields(arguments)}


def test_vllm_s_workers_have_what_is_called_in_them() -> None:
    calls = [node for node in ast.walk(TREES[CORE]) if isinstance(node, ast.Call)]
    asked = [call for call in calls if ast.unparse(call.func).endswith(".collective_rpc")]
    assert asked
    for call in asked:
        method = ast.literal_eval(call.args[0])
        assert has(resolve_name(WORKER), method)
        (words,) = [word.value for word in call.keywords if word.arg == "kwargs"]
        assert isinstance(words, ast.Dict)
        names = {key.value for key in words.keys if isinstance(key, ast.Constant)}
        assert names <= inspect.signature(getattr(resolve_name(RUNNER), method)).parameters.keys()


def test_vllm_knows_the_variables_of_the_environment() -> None:
    known = resolve_name("vllm.envs.environment_variables")
    assert variables() and variables() <= known.keys()
