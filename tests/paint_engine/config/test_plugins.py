"""Plugins by name: built-in ones are found among a package's modules, a user's by import."""

import sys
from pathlib import Path

import pytest

from paint_engine.config.plugins import load_plugin, plugin_names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package of two plugins, and of a module that is none and that notes its import."""
    folder = tmp_path / "plugin_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("PLUGIN = 'the first'\n")
    (folder / "second.py").write_text("PLUGIN = 'the second'\n")
    (folder / "helper.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "plugin_package"
    for name in [name for name in sys.modules if name.split(".")[0] == "plugin_package"]:
        del sys.modules[name]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the user's module `own_plugins`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> None:
        (tmp_path / "own_plugins.py").write_text(source)

    yield write
    sys.modules.pop("own_plugins", None)


def load(name: str, package: str = "plugin_package"):
    return load_plugin(name, package, "PLUGIN", "section.name")


def refusal(name: str, package: str = "plugin_package") -> str:
    with pytest.raises(ValueError) as refused:
        load(name, package)
    return str(refused.value)


def test_a_built_in_plugin_is_found_without_importing_the_others(package: str) -> None:
    assert load("second") == "the second"
    assert {"plugin_package.first", "plugin_package.helper"}.isdisjoint(sys.modules)


def test_the_built_in_names_are_the_modules_that_have_the_attribute(package: str) -> None:
    assert plugin_names(package, "PLUGIN") == ("first", "second")


@pytest.mark.parametrize("name", ["helper", "thrid", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(package: str, name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"section.name: got {name!r}; needs one of first, second, or module:")


def test_a_misspelt_built_in_name_is_guessed(package: str) -> None:
    assert refusal("frist").endswith("; did you mean first?")


def test_an_attribute_of_a_users_module_is_loaded(package: str, own_module) -> None:
    own_module("class Box:\n    inner = 7\ndef reward(): ...\n")
    assert load("own_plugins:Box.inner") == 7
    assert load("own_plugins:reward") is sys.modules["own_plugins"].reward


@pytest.mark.parametrize(
    "name", ["own.py:f", "./own:f", ":f", "own:", "own:a:b", "own:f()", "own plugins:f", "own:.f"]
)
def test_a_malformed_name_says_what_is_needed(package: str, name: str) -> None:
    message = refusal(name)
    assert f"got {name!r}; needs module:attribute" in message and "my_module:f" in message


def test_a_module_that_is_not_there_names_pythonpath(package: str) -> None:
    message = refusal("not_there_at_all:f")
    assert "No module named 'not_there_at_all'" in message and "PYTHONPATH" in message


def test_a_package_that_a_users_module_lacks_is_not_taken_for_the_module(
    package: str, own_module
) -> None:
    own_module("import not_installed_here\n")
    message = refusal("own_plugins:f")
    assert "No module named 'not_installed_here'" in message and "own_plugins.py:1" in message
    assert "PYTHONPATH" not in message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\nx.y\n", "AttributeError: 'int' object has no attribute 'y', "),
        ("def f(:\n", "SyntaxError: invalid syntax (own_plugins.py, line 1)"),
        ("raise RuntimeError('no licence')\n", "RuntimeError: no licence, "),
    ],
)
def test_an_import_that_fails_is_reported_with_its_own_text(
    package: str, own_module, source: str, reason: str
) -> None:
    own_module(source)
    message = refusal("own_plugins:f")
    assert "got 'own_plugins:f', whose import fails" in message and reason in message


def test_a_missing_attribute_is_guessed(package: str, own_module) -> None:
    own_module("def my_reward(problem, text): ...\n")
    assert refusal("own_plugins:my_rewrad").endswith(
        "which has no 'my_rewrad'; did you mean my_reward?"
    )
    assert "correct the part after the colon" in refusal("own_plugins:zzz")
