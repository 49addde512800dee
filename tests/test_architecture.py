"""The house: imports point one way, heavy libraries live in one room each, and files stay short enough to read."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import mpdeploy

HOUSE = Path(mpdeploy.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
MAX_LINES = 400

GROUND = {"artifact", "config", "data_files", "distributed", "environment", "errors", "files", "run_dir", "user_code"}
CAN_RUN = {"engines", "measure", "precision"} | GROUND
# room -> the rooms it may import, as drawn in the design: cli -> pipeline -> train, export, precision, engines -> gates, measure
# -> the ground floor
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    # the ground floor, from the bottom up
    "errors": set(),
    "environment": set(),
    "distributed": set(),
    "files": {"errors"},
    "user_code": {"errors"},
    "artifact": {"errors", "files"},
    "config": {"errors", "user_code"},
    "run_dir": {"artifact", "errors", "files"},
    "data_files": {"artifact", "errors", "user_code"},
    "run_history": {"errors", "run_dir"},
    # it measures and decides; it knows no engine
    "measure": {"artifact", "errors", "user_code"},
    "gates": {"measure"} | GROUND,
    # it trains, rewrites, builds
    "train": GROUND,
    "precision": {"artifact", "errors", "files"},
    "engines": {"precision"} | GROUND,
    "export": CAN_RUN,
    "scaffold": GROUND,
    "pipeline": GROUND,
    "stages": {"export", "gates", "pipeline", "train"} | CAN_RUN,
    "report": {"gates", "measure"} | GROUND,
    "serve": {"engines", "gates"} | GROUND,
    "train_and_export": {"gates", "pipeline", "report", "stages"} | CAN_RUN,
}  # fmt: skip
# what the verbs call (`building.py`, `conversion.py`, ...): any file at the top that has no row of its own, and the search on models
CALLED = ({path.stem for path in HOUSE.glob("*.py")} | {"searching"}) - set(MAY_IMPORT)
MAY_IMPORT |= dict.fromkeys(CALLED, CALLED | CAN_RUN)
MAY_IMPORT["stages"] |= CALLED
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"__main__", "stages", "train", "export", "precision"}

# library -> where it may be imported at all
ROOM_OF_LIBRARY: dict[str, tuple[str, ...]] = {
    "torch": ("train/", "export/", "stages/", "engines/tensorrt/", "engines/pytorch.py"),
    "safetensors": ("train/", "export/"),
    "sklearn": ("train/data/digits.py",),
    "onnxruntime": ("engines/onnxruntime.py",),
    "openvino": ("engines/openvino.py",),
    "tensorrt": ("engines/tensorrt/",),
    "tensorrt_rtx": ("engines/tensorrt/",),
    "tensorrt_rtx_bindings": ("engines/tensorrt/",),
    "polygraphy": ("engines/tensorrt/",),
    "pydantic": ("config/",),
    "filelock": ("run_dir.py",),
    "jinja2": ("report/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "uvicorn": ("serve/",),
    "orjson": ("serve/",),
    "prometheus_client": ("serve/",),
    "grpc": ("serve/",),
    "grpc_tools": ("serve/",),
    "opentelemetry": ("serve/",),
    "ray": ("serve/",),
    "tritonclient": ("serve/package/",),
    "yaml": ("serve/",),
    "tensorboard": ("train/",),
    "wandb": ("train/",),
    "pyarrow": ("train/",),
    "datasets": ("train/",),
    "transformers": ("train/",),
    "PIL": ("train/data/images.py",),
}
# library -> where it may be imported when a module is loaded, and not only when a function runs
LOADED_WITH_MODULE: dict[str, tuple[str, ...]] = {
    "torch": ("train/", "export/", "engines/tensorrt/session.py", "engines/pytorch.py"),
    "pydantic": ("config/",),
    "typer": ("cli/",),
    "rich": ("cli/live.py",),
}
HEAVY = {
    *ROOM_OF_LIBRARY, "numpy", "onnx", "onnx_ir", "onnxscript", "scipy", "ml_dtypes", "psutil", "matplotlib",
} - {"typer", "rich"}  # fmt: skip


def imports(source: str, package: str = "mpdeploy") -> Iterator[tuple[str, bool]]:
    """Every module that `source` imports, and whether loading the file is enough to import it."""

    def walk(node: ast.AST, loaded: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, loaded) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"a relative import of {child.module}: write the whole name"
                yield child.module or "", loaded
                if child.module == package:
                    yield from ((f"{package}.{alias.name}", loaded) for alias in child.names)
            else:
                in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from walk(child, loaded and not in_function and not typing_only)

    yield from walk(ast.parse(source), True)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def room_of_file(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def wrong_imports(room: str, source: str) -> list[str]:
    """Rooms that `source`, a file of `room`, imports and may not."""
    found = {room_of(name) for name, _ in imports(source) if name.split(".")[0] == "mpdeploy"}
    return sorted(found - MAY_IMPORT[room] - {room, "__init__"})


def where(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def lies_in(path: Path, places: tuple[str, ...]) -> bool:
    return any(where(path) == place or (place.endswith("/") and where(path).startswith(place)) for place in places)


def faults(find: Callable[[Path], object]) -> dict[str, object]:
    """File -> what `find` finds wrong with it, of the files where it finds something."""
    return {where(path): wrong for path in FILES if (wrong := find(path))}


def test_every_package_has_a_row_in_the_import_rule():
    assert {room_of_file(path) for path in FILES} <= set(MAY_IMPORT)


def test_imports_point_one_way():
    assert faults(lambda path: wrong_imports(room_of_file(path), path.read_text())) == {}


@pytest.mark.parametrize(
    ("room", "source", "caught"),
    [
        ("precision", "from mpdeploy.engines.onnxruntime import OrtRunner", ["engines"]),
        ("precision", "def late():\n    import mpdeploy.measure.drift", ["measure"]),
        ("measure", "from mpdeploy import engines", ["engines"]),
        ("gates", "if True:\n    from mpdeploy.report import html", ["report"]),
        ("run_dir", "from mpdeploy.pipeline import Stage", ["pipeline"]),
        ("precision", "from mpdeploy.artifact import TensorSpec", []),
    ],
)
def test_the_import_rule_catches_an_import_that_points_up(room, source, caught):
    assert wrong_imports(room, source) == caught


def test_no_room_but_the_entry_point_imports_the_command_line():
    assert [room for room, allowed in MAY_IMPORT.items() if "cli" in allowed] == ["__main__"]


def in_circles(imported: Mapping[str, set[str]]) -> set[str]:
    """Rooms that import each other in a circle, and those above them."""
    left = {room: names - {room} for room, names in imported.items()}
    while ready := {room for room, names in left.items() if not names & left.keys()}:
        left = {room: names for room, names in left.items() if room not in ready}
    return set(left)


def test_no_rooms_import_each_other_in_a_circle():
    imported: dict[str, set[str]] = {}
    for path in FILES:
        names = {room_of(name) for name, _ in imports(path.read_text()) if name.split(".")[0] == "mpdeploy"}
        imported.setdefault(room_of_file(path), set()).update(names - {"__init__"})
    assert in_circles(imported) == set()


def test_a_circle_is_found():
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set()}) == {"a", "b", "c"}


def misplaced(path: Path, rooms: Mapping[str, tuple[str, ...]], *, when_loaded: bool) -> list[str]:
    """Libraries that the file imports (`when_loaded`: as soon as it is loaded) and that are not at home there."""
    found = (name.split(".")[0] for name, loaded in imports(path.read_text()) if loaded or not when_loaded)
    return sorted({name for name in found if name in ROOM_OF_LIBRARY and not lies_in(path, rooms.get(name, ()))})


def test_a_library_is_imported_in_its_own_room_only():
    assert faults(lambda path: misplaced(path, ROOM_OF_LIBRARY, when_loaded=False)) == {}


def test_loading_a_module_loads_no_heavy_library():
    assert faults(lambda path: misplaced(path, LOADED_WITH_MODULE, when_loaded=True)) == {}


def test_the_library_rule_tells_a_lazy_import_from_an_eager_one():
    lazy, eager = "def f():\n    import torch\n", "class C:\n    import torch\n"
    assert list(imports(lazy)) == [("torch", False)]
    assert list(imports(eager)) == [("torch", True)]
    assert list(imports(f"if TYPE_CHECKING:\n    import torch\n{eager}")) == [("torch", False), ("torch", True)]


def test_precision_takes_models_from_onnx_libraries_and_numpy_alone():
    allowed = {"onnx", "onnx_ir", "onnxscript", "numpy", "ml_dtypes", "scipy", "mpdeploy"} | sys.stdlib_module_names
    for path in (HOUSE / "precision").rglob("*.py"):
        foreign = {name.split(".")[0] for name, _ in imports(path.read_text())} - allowed
        assert not foreign, f"{where(path)} imports {foreign}"


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules after `code` ran in a process of its own."""
    text = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(' '.join(sys.modules), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60)
    return {name.split(".")[0] for name in process.stderr.split()}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import mpdeploy", set()),
        ("import mpdeploy.cli", set()),
        ("sys.argv = ['mpdeploy', '--help']; from mpdeploy.cli import main; main()", set()),
        # typer itself checks a verb's arguments with pydantic
        ("sys.argv = ['mpdeploy', 'convert', '--help']; from mpdeploy.cli import main; main()", {"pydantic"}),
    ],
)
def test_help_imports_no_heavy_library(code, allowed):
    assert modules_after(code) & HEAVY <= allowed


def test_the_check_for_heavy_libraries_sees_one_that_is_imported():
    assert "numpy" in modules_after("import mpdeploy; mpdeploy.Pipeline; import mpdeploy.artifact")


def test_help_takes_less_than_300_ms():
    """Of CPU time, the least of up to 20 runs: other tests run beside this one, and two cores that share their caches are slower."""
    command = Path(sys.executable).with_name("mpdeploy")
    seconds: list[float] = []
    while len(seconds) < 20 and min(seconds, default=1) >= 0.3:
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([command, "--help"], capture_output=True, check=True, timeout=60)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_a_file_past_400_lines_is_two_files():
    assert faults(lambda path: max(0, len(path.read_text().splitlines()) - MAX_LINES)) == {}


def test_a_module_says_what_it_is():
    assert faults(lambda path: not (ast.get_docstring(ast.parse(path.read_text())) or "").strip()) == {}


@pytest.mark.parametrize("name", [name for name in mpdeploy.__all__ if name != "__version__"])
def test_every_public_name_can_be_had_from_the_package(name):
    assert callable(getattr(mpdeploy, name))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mpdeploy.trian  # noqa: B018
