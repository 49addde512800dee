"""The user's own functions: importing their file, digesting the source they can reach, and showing *their* traceback."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
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
    except (Exception, SystemExit) as error:  # a pipeline file that ends the process must not end with its exit code 0
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
    if trace is None:  # a syntax error has no frame of theirs; the exception itself shows file and line
        return "".join(traceback.format_exception_only(error)).rstrip()
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


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

    Formatting, comments and docstrings do not count; an edit to a helper or a constant it uses does, and so does one anywhere in
    another module of theirs that it imports. What is installed (torch, mpdeploy) counts by its version, in the stage's record, and not here.
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
        _add(parts, "partial", _text_of([value.args, value.keywords or {}], parts, seen))
        return
    if inspect.ismethod(value):
        _add(parts, "self", _text_of(getattr(value.__self__, "__dict__", {}), parts, seen))
        value = value.__func__
    if not isinstance(value, FunctionType | type):
        _add(parts, "object", _text_of(getattr(value, "__dict__", {}), parts, seen))
        value = type(value)
    module = sys.modules.get(value.__module__)
    filename = getattr(module, "__file__", None)
    if module is None or filename is None or not _is_users_file(filename):
        parts[f"installed:{value.__module__}:{value.__qualname__}"] = ""
        return
    if isinstance(value, FunctionType) and value.__closure__:
        cells = [cell.cell_contents for cell in value.__closure__ if cell.cell_contents is not value]
        _add(parts, f"closure:{value.__qualname__}", _text_of(cells, parts, seen))
    definitions = _definitions(Path(filename))
    root = value.__qualname__.split(".")[0]
    queue = [root, "*"] if root in definitions else list(definitions)  # a lambda has no name: all of its file counts
    while queue:
        name = queue.pop()
        key = f"{Path(filename).name}:{name}"
        if key in parts or name not in definitions:
            continue
        definition = definitions[name]
        parts[key] = definition.text
        queue += definition.used
        for imported in definition.imported:
            _collect_module(imported, parts)


def _add(parts: dict[str, str], key: str, text: str) -> None:
    parts[key] = f"{parts.get(key, '')}{text};"


def _text_of(value: Any, parts: dict[str, str], seen: set[int]) -> str:
    """A value as text that is the same in every process; the source of functions and classes in it is collected."""
    if isinstance(value, dict):
        return _text_of([[str(key), value[key]] for key in sorted(value, key=str)], parts, seen)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text_of(item, parts, seen) for item in value)}]"
    if value is None or isinstance(value, int | float | str | bytes):
        return repr(value)
    if callable(value):
        _collect(value, parts, seen)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _collect_module(name: str, parts: dict[str, str]) -> None:
    """A module of the user's as a whole, with those of theirs that it imports."""
    parent = name.rpartition(".")[0]
    if parent:
        _collect_module(parent, parts)
    path = _users_module(name)
    if path is None or f"module:{name}" in parts:
        return
    tree = _parsed_without_docstrings(path)
    parts[f"module:{name}"] = ast.dump(tree)
    for imported in _imports(tree, name if path.name == "__init__.py" else parent):
        _collect_module(imported, parts)


def _users_module(name: str) -> Path | None:
    """The file of a module if it is the user's own, imported yet or not; what is installed is not imported to find out."""
    top = name.split(".", maxsplit=1)[0]
    if top != name and _users_module(top) is None:
        return None
    filename = getattr(sys.modules.get(name), "__file__", None)
    if filename is None:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            filename = spec.origin if spec is not None else None
    return Path(filename) if filename and filename.endswith(".py") and _is_users_file(filename) else None


def _imports(tree: ast.AST, package: str) -> list[str]:
    """Names of modules, and of what may be modules, that a syntax tree imports anywhere in it."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + base, package)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


@dataclass
class _Definition:
    """Statements that make or change a top-level name: their syntax trees as text, names they use, modules they import."""

    text: str = ""
    used: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)


def _definitions(path: Path) -> dict[str, _Definition]:
    found: dict[str, _Definition] = {}
    for node in _parsed_without_docstrings(path).body:
        if isinstance(
            node, ast.Import | ast.ImportFrom
        ):  # name by name: another one in the same line changes none of these
            for alias in node.names:
                one = type(node)(**{**dict(ast.iter_fields(node)), "names": [alias]})
                definition = found.setdefault(alias.asname or alias.name.split(".")[0], _Definition())
                definition.text += ast.dump(one)
                definition.imported += _imports(one, "")
            continue
        used = [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)]
        else:  # an `if`, a `try`, a bare call: it may change whatever it names
            names = used + [child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.ClassDef)]
            aliases = [child for child in ast.walk(node) if isinstance(child, ast.alias)]
            names += [alias.asname or alias.name.split(".")[0] for alias in aliases]
        for name in dict.fromkeys(names):
            definition = found.setdefault(name, _Definition())
            definition.text += ast.dump(node)
            definition.used += used
            definition.imported += _imports(node, "")
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
