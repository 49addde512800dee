"""The user's own functions: importing their file, digesting the source they can reach, and showing *their* traceback."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any, TypeVar

from mpdeploy.errors import MpdeployError, UserCodeError

T = TypeVar("T")
_OWN_FOLDER = Path(__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib"))


def import_file(path: Path) -> ModuleType:
    """Import a Python file as a module of its own; its folder is importable from it, as when Python runs a script.

    Raises:
        UserCodeError: it raised, or does not parse.
    """
    path = path.resolve()
    name = f"mpdeploy_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserCodeError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        user_call(spec.loader.exec_module, module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def user_call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of the user's.

    Raises:
        UserCodeError: it raised; the message is the part of the traceback that lies in their files. Validation errors of
            our own config types and our own errors pass through.
    """
    try:
        return function(*args, **kwargs)
    except MpdeployError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("pydantic"):
            raise
        raise UserCodeError(
            f"{_where(error)} raised {type(error).__name__}: {error}\n\n{_their_traceback(error)}",
            hint="this comes from your own code, not from mpdeploy",
        ) from error


def _their_traceback(error: BaseException) -> str:
    """The traceback from the first frame outside mpdeploy and the import system."""
    trace = error.__traceback__
    while trace is not None and not _is_users(trace):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__)).rstrip()


def _where(error: BaseException) -> str:
    place = "The pipeline file"
    trace = error.__traceback__
    while trace is not None:
        if _is_users(trace):
            place = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno},"
        trace = trace.tb_next
    return place


def _is_users(trace: TracebackType) -> bool:
    return _is_users_file(trace.tb_frame.f_code.co_filename)


def _is_users_file(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename)
    return not path.is_relative_to(_OWN_FOLDER) and not any(path.is_relative_to(folder) for folder in _INSTALLED)


def describe_callable(function: Callable[..., Any]) -> dict[str, str]:
    """Name a function and digest its source with all of the user's own source that it can reach by name.

    Formatting, comments and docstrings do not count; an edit to a helper or a constant it uses does, and so does one in another
    module of theirs. What is installed (torch, mpdeploy) counts by its version, in the stage's record, and not here.
    """
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"
    if name.startswith(
        "mpdeploy_user_"
    ):  # the module's name holds its path's digest: a moved run is still the same run
        name = name.split(":", 1)[1]
    return {"function": name, "source": source_digest(function)}


def source_digest(function: Callable[..., Any]) -> str:
    """Hex digest of the source reachable from `function` (see `describe_callable`)."""
    parts: dict[str, str] = {}
    _collect(function, parts, seen=set())
    text = "\n".join(f"{key}\n{parts[key]}" for key in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(value: Any, parts: dict[str, str], seen: set[int]) -> None:
    value = inspect.unwrap(value) if callable(value) else value
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, "func") and hasattr(value, "args"):  # functools.partial
        _collect(value.func, parts, seen)
        parts[f"partial:{value.func!r}"[:80]] = repr((value.args, sorted((value.keywords or {}).items())))
        return
    if inspect.ismethod(value):
        value = value.__func__
    if not isinstance(value, FunctionType | type):
        value = type(value)
    module = sys.modules.get(value.__module__)
    filename = getattr(module, "__file__", None)
    if module is None or filename is None or not _is_users_file(filename):
        parts[f"installed:{value.__module__}:{value.__qualname__}"] = ""
        return
    definitions = _definitions(Path(filename))
    queue = [value.__qualname__.split(".")[0]]
    if isinstance(value, FunctionType) and value.__closure__:
        cells = [cell.cell_contents for cell in value.__closure__ if cell.cell_contents is not value]
        parts[f"closure:{value.__qualname__}"] = repr(
            [cell for cell in cells if isinstance(cell, int | float | str | tuple)]
        )
        for cell in cells:
            if isinstance(cell, FunctionType | type):
                _collect(cell, parts, seen)
    while queue:
        name = queue.pop()
        key = f"{Path(filename).name}:{name}"
        if key in parts:
            continue
        if name in definitions:
            text, used = definitions[name]
            parts[key] = text
            queue += used
        # what the name is bound to may come from another file of the user's
        bound = getattr(module, name, None)
        if isinstance(bound, ModuleType) and bound.__file__ and _is_users_file(bound.__file__):
            parts[f"module:{bound.__name__}"] = ast.dump(_parsed_without_docstrings(Path(bound.__file__)))
        elif isinstance(bound, FunctionType | type) and bound.__module__ != value.__module__:
            _collect(bound, parts, seen)


def _definitions(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Top-level name -> (its definition's syntax tree as text, the names that the definition uses)."""
    found: dict[str, tuple[str, list[str]]] = {}
    for node in _parsed_without_docstrings(path).body:
        used = [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)]
        else:
            continue
        for name in names:
            before = found.get(name, ("", []))
            found[name] = (before[0] + ast.dump(node), before[1] + used)
    return found


def _parsed_without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return tree
