"""Loads recipes, contexts, token weights and rewards by name: built-in or of a user's own module.

"math" is the plugin of the package's module `math`. "my_module:my_reward" is the object `my_reward`
of `my_module`; the module is found as by `import my_module`.
"""

import difflib
import importlib
import importlib.util
import re
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def is_own(name: str) -> bool:
    """Returns whether the name is a user's own module:attribute, which is imported."""
    return ":" in name


@cache
def plugin_names(package: str, attribute: str) -> tuple[str, ...]:
    """Returns the names of the built-in plugins, sorted: the modules of `package` whose source
    assigns `attribute`.

    No module is imported, because other modules of the package may need PyTorch.
    """
    assigned = re.compile(rf"^{attribute}\b.*=", re.MULTILINE)
    return tuple(
        name
        for name, file in sorted(_module_files(package).items())
        if assigned.search(file.read_text(encoding="utf-8"))
    )


def load_plugin(name: str, package: str, attribute: str, key: str) -> Any:
    """Returns the plugin that a configuration key names.

    name: a built-in plugin ("math" is `attribute` of the module `{package}.math`), or
        "module:attribute" of the user's own, where both may be dotted.
    package: the package of the built-in plugins, "paint_engine.rewards".
    attribute: the name of the plugin in such a module, "REWARD".
    key: the configuration key, for messages.

    Raises ValueError if no built-in plugin has the name, or if the user's module cannot be imported
    or has no such attribute. Importing a module runs its code.
    """
    if is_own(name):
        return _load_own(name, key)
    names = plugin_names(package, attribute)
    if name in names:
        return getattr(importlib.import_module(f"{package}.{name}"), attribute)
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
        f"{key}: got {name!r}; needs one of {', '.join(names)}, or module:attribute of your own"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _module_files(package: str) -> dict[str, Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return {
        file.stem: file
        for directory in spec.submodule_search_locations
        for file in Path(directory).glob("*.py")
    }


def load_class(
    name: str, package: str, attribute: str, key: str, base: type[T], needed: tuple[str, str]
) -> type[T]:
    """Returns the subclass of `base` that a name stands for, as `load_plugin` finds it.

    needed: the two members that `base` declares and that the class must have.

    Raises ValueError if there is none, or if it lacks one of them.
    """
    found, kind = load_plugin(name, package, attribute, key), base.__name__
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"{key}: got {name!r}, which is {found!r}; needs a subclass of {package}.{kind}; name "
            f"the class itself, as in my_module:My{kind}"
        )
    if any(getattr(found, member) is getattr(base, member) for member in needed):
        raise ValueError(
            f"{key}: got {name!r}, which lacks `{needed[0]}` or `{needed[1]}`; needs both; "
            f"implement them, or derive the class from a {kind.lower()} that has them"
        )
    return found


def _load_own(name: str, key: str) -> Any:
    module_name, _, path = name.partition(":")
    is_file = module_name.endswith(".py") or "/" in module_name
    if is_file or not all(part.isidentifier() for part in f"{module_name}.{path}".split(".")):
        raise ValueError(
            f"{key}: got {name!r}; needs module:attribute, with the module's name as in `import`; "
            "for the object f in ./my_module.py give my_module:f"
        )
    found: Any = _import_own(module_name, name, key)
    for part in path.split("."):
        if not hasattr(found, part):
            public = [defined for defined in dir(found) if not defined.startswith("_")]
            near = difflib.get_close_matches(part, public, n=1)
            raise ValueError(
                f"{key}: got {name!r}; needs an attribute of {module_name}, which has no {path!r}"
                + (f"; did you mean {near[0]}?" if near else "; correct the part after the colon")
            )
        found = getattr(found, part)
    return found


def _import_own(module_name: str, name: str, key: str) -> ModuleType:
    # A file that was just written may be missing from Python's cached listing of its directory.
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(_import_refusal(name, key, error)) from error
        raise ValueError(
            f"{key}: got {name!r}; needs a module that Python can import ({error}); run the "
            "command in the directory of the module's file, or add that directory to PYTHONPATH"
        ) from error
    # A user's module may raise anything on import.
    except Exception as error:
        raise ValueError(_import_refusal(name, key, error)) from error


def _import_refusal(name: str, key: str, error: Exception) -> str:
    # The module failed in the last frame. A SyntaxError names its own file and line.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f", {frame.filename}:{frame.lineno}"
    return (
        f"{key}: got {name!r}, whose import fails ({type(error).__name__}: {error}{where}); needs "
        "a module that Python can import; fix the error"
    )
