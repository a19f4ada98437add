"""Recipes and rewards by name: the built-in ones and those of a user's own module.

"math" is what the package's module `math` offers. "my_module:my_reward" is the object `my_reward`
of `my_module`, which is found as `import my_module` finds it.
"""

import difflib
import importlib
import importlib.util
import pkgutil
import traceback
from types import ModuleType
from typing import Any


def plugin_names(package: str, attribute: str) -> tuple[str, ...]:
    """The built-in plugins, sorted: the modules of `package` that define `attribute`.

    Imports every module of the package to find out.
    """
    return tuple(
        name
        for name in _module_names(package)
        if hasattr(importlib.import_module(f"{package}.{name}"), attribute)
    )


def load_plugin(name: str, package: str, attribute: str, key: str) -> Any:
    """The plugin that a configuration key names.

    name: a built-in one ("math" is `attribute` of the module `{package}.math`), or
        "module:attribute" of the user's own, where both may be dotted.
    package: where the built-in ones live, "paint_engine.rewards".
    attribute: what such a module calls its plugin, "REWARD".
    key: the configuration key, for messages.

    Raises ValueError where no built-in plugin has the name, or where the user's module cannot be
    imported or has no such attribute. Importing a module runs its code.
    """
    if ":" in name:
        return _load_own(name, key)
    if name in _module_names(package):
        module = importlib.import_module(f"{package}.{name}")
        if hasattr(module, attribute):
            return getattr(module, attribute)
    names = plugin_names(package, attribute)
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
        f"{key}: got {name!r}; needs one of {', '.join(names)}, or module:attribute of your own"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _module_names(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


def _load_own(name: str, key: str) -> Any:
    module_name, _, path = name.partition(":")
    is_file = module_name.endswith(".py") or "/" in module_name
    if is_file or not all(part.isidentifier() for part in f"{module_name}.{path}".split(".")):
        raise ValueError(
            f"{key}: got {name!r}; needs module:attribute, the module as `import` names it; for "
            "the object f in ./my_module.py give my_module:f"
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
    # A file that was written a moment ago may be missing from Python's listing of its directory.
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(_import_refusal(name, key, error)) from error
        raise ValueError(
            f"{key}: got {name!r}; needs a module that Python can import ({error}); start the "
            "command in the directory of the module's file, or add that directory to PYTHONPATH"
        ) from error
    # A user's module may raise anything when it is imported.
    except Exception as error:
        raise ValueError(_import_refusal(name, key, error)) from error


def _import_refusal(name: str, key: str, error: Exception) -> str:
    # The last frame is where the module failed; a SyntaxError names its file and line itself.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f", {frame.filename}:{frame.lineno}"
    return (
        f"{key}: got {name!r}, whose import fails ({type(error).__name__}: {error}{where}); needs "
        "a module that Python can import; correct it"
    )
