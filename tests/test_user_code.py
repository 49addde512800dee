"""What makes a stage run again: the source of the user's functions that can be reached, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mpdeploy.errors import ConfigError, UserCodeError
from mpdeploy.user_code import describe_callable, import_file, source_digest, user_call

MODEL = '''
"""A pipeline."""
import functools

import helpers_beside
from helpers_beside import made, RATE
import helpers_more.deep as deep

WIDTH = 8
UNUSED = 1
SIZES: list[int] = [1]
SIZES += [2]


def block(channels):
    """A block."""
    return channels * 2


class Base:
    bias = 0.0


class Network(Base):
    """A network."""

    def __init__(self):
        self.width = block(WIDTH)  # a comment

    def forward(self, x):
        scale = helpers_beside.scale(x)
        return deep.deepest(made(scale * RATE * SIZES[0]))


def model():
    return Network()


def loss(outputs, labels):
    return abs(outputs - labels)


def make(width):
    def build():
        return width
    return build


small = make(8)
large = make(16)
short = lambda: block(1)
bound = functools.partial(make, 8)


class Loader:
    def load(self, config):
        return config

    def __call__(self, config):
        return block(config)


def pipeline():
    gates = [("accuracy", 0.02)]
    return model, gates
'''
HELPERS = "RATE = 0.5\n\n\ndef scale(x):\n    return x * 2\n\n\ndef made(x):\n    return [x]\n"
DEEP = "from helpers_more.deeper import value\n\n\ndef deepest(x):\n    return x + value()\n"
DEEPER = "def value():\n    return 1\n"


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """A function that writes the pipeline and its neighbours with one thing changed, and digests a name of it afresh."""

    def write(name: str, old: str = "", new: str = "", *, file: str = "mine.py", under: str = "here") -> str:
        folder = tmp_path / under
        (folder / "helpers_more").mkdir(parents=True, exist_ok=True)
        texts = {
            "mine.py": MODEL,
            "helpers_beside.py": HELPERS,
            "helpers_more/__init__.py": "",
            "helpers_more/deep.py": DEEP,
            "helpers_more/deeper.py": DEEPER,
        }
        assert old in texts[file], f"{old!r} is not in {file}: this changes nothing"
        texts[file] = texts[file].replace(old, new, 1) if old else texts[file] + new
        for path, text in texts.items():
            (folder / path).write_text(text)
        for module in [key for key in sys.modules if key.startswith("helpers_")]:
            del sys.modules[module]
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(tmp_path))])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return source_digest(getattr(import_file(folder / "mine.py"), name))

    return write


@pytest.mark.parametrize(
    ("what", "old", "new", "file"),
    [
        ("the body of a method", "return deep.deepest(made(scale", "return deep.deepest(made(1 + scale", "mine.py"),
        ("the body of the function", "    return Network()", "    return Network", "mine.py"),
        ("a helper", "channels * 2", "channels * 3", "mine.py"),
        ("a default", "def block(channels)", "def block(channels=1)", "mine.py"),
        ("a constant", "WIDTH = 8", "WIDTH = 9", "mine.py"),
        ("a base class", "bias = 0.0", "bias = 1.0", "mine.py"),
        ("a constant with a type", "SIZES: list[int] = [1]", "SIZES: list[int] = [3]", "mine.py"),
        ("what is added to a constant", "SIZES += [2]", "SIZES += [4]", "mine.py"),
        ("a function of another module", "return x * 2", "return x * 3", "helpers_beside.py"),
        ("a function taken from another module", "return [x]", "return [x, x]", "helpers_beside.py"),
        ("a constant taken from another module", "RATE = 0.5", "RATE = 0.25", "helpers_beside.py"),
        ("a module in a package", "x + value()", "x - value()", "helpers_more/deep.py"),
        ("what another module imports", "return 1", "return 2", "helpers_more/deeper.py"),
    ],
)
def test_an_edit_to_what_the_model_reaches_changes_its_digest(digest, what, old, new, file):
    assert digest("model") != digest("model", old, new, file=file), what


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("a comment", "  # a comment", "  # another"),
        ("a new comment line", "def block", "# said here\ndef block"),
        ("a docstring", '"""A network."""', '"""Another text."""'),
        ("a docstring that goes", '    """A block."""\n', ""),
        ("the module's docstring", '"""A pipeline."""', '"""Mine."""'),
        ("formatting", "return channels * 2", "return (\n        channels   *   2\n    )"),
        ("empty lines", "WIDTH = 8", "\n\n\nWIDTH = 8\n"),
        ("an edited gate", '("accuracy", 0.02)', '("accuracy", 0.5)'),
        ("a constant it does not use", "UNUSED = 1", "UNUSED = 2"),
        ("a function it does not use", "abs(outputs - labels)", "abs(labels - outputs)"),
        ("one more name from a module", "import made, RATE", "import made, RATE, made as unused"),
        ("a new function", "", "\n\ndef another():\n    return 3\n"),
    ],
)
def test_an_edit_that_the_model_cannot_see_keeps_its_digest(digest, what, old, new):
    assert digest("model") == digest("model", old, new), what


SMALL = """
import sys
from helpers_beside import RATE

if RATE:
    WIDTH = 8
else:
    WIDTH = 4
OPTIONS = {}
OPTIONS.update(depth=2)


def constant():
    return RATE


def branch():
    return WIDTH


def updated():
    return OPTIONS


def late():
    from helpers_more.deep import deepest

    return deepest(1)


class Loader:
    def __init__(self, shift):
        self.shift = shift

    def load(self, config):
        return self.shift


method = Loader(2).load
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "file"),
    [
        ("constant", "RATE = 0.5", "RATE = 0.25", "helpers_beside.py"),
        ("branch", "    WIDTH = 8", "    WIDTH = 16", "mine.py"),
        ("updated", "depth=2", "depth=3", "mine.py"),
        ("late", "x + value()", "x - value()", "helpers_more/deep.py"),
        ("late", "return 1", "return 2", "helpers_more/deeper.py"),
        ("method", "Loader(2)", "Loader(3)", "mine.py"),
        ("method", "return self.shift", "return -self.shift", "mine.py"),
    ],
)
def test_an_edit_is_seen_however_it_is_reached(digest, monkeypatch, name, old, new, file):
    monkeypatch.setitem(globals(), "MODEL", SMALL)
    assert digest(name) != digest(name, old, new, file=file)


def test_an_edited_helper_module_changes_only_who_uses_it(digest):
    edit = {"old": "return x * 2", "new": "return x * 3", "file": "helpers_beside.py"}
    assert digest("loss") == digest("loss", **edit)


def test_the_same_source_in_another_folder_has_the_same_digest(digest):
    assert digest("model") == digest("model", under="moved")


def test_functions_closed_over_different_values_differ(digest):
    assert digest("small") != digest("large")


def test_an_edited_lambda_changes_its_digest(digest):
    assert digest("short") != digest("short", "short = lambda: block(1)", "short = lambda: block(2)")


def test_a_partial_of_other_arguments_differs(digest):
    assert digest("bound") != digest("bound", "functools.partial(make, 8)", "functools.partial(make, 9)")


def test_a_partial_s_function_counts(digest):
    assert digest("bound") != digest("bound", "        return width", "        return width + 1")


@pytest.mark.parametrize("name", ["model", "short", "bound", "small", "Loader"])
def test_a_digest_is_the_same_in_another_process(digest, tmp_path, name):
    here = digest(name)
    code = (
        "from pathlib import Path; from mpdeploy.user_code import import_file, source_digest; "
        f"print(source_digest(getattr(import_file(Path({str(tmp_path / 'here' / 'mine.py')!r})), {name!r})))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == here


def test_an_object_that_is_called_counts_by_its_class(tmp_path):
    def digest_of(text: str) -> str:
        (tmp_path / "mine.py").write_text(textwrap.dedent(text))
        return source_digest(import_file(tmp_path / "mine.py").load)

    loader = "class Loader:\n    def __call__(self, config):\n        return 1\n\n\nload = Loader()\n"
    assert digest_of(loader) != digest_of(loader.replace("return 1", "return 2"))


def test_installed_code_counts_by_name_alone():
    import json

    found = describe_callable(json.loads)
    assert found["function"] == "json:loads"
    assert source_digest(json.loads) == source_digest(json.loads) != source_digest(json.dumps)


def test_a_function_of_the_user_is_named_without_its_path(digest, tmp_path):
    digest("model")
    module = import_file(tmp_path / "here" / "mine.py")
    assert describe_callable(module.model)["function"] == "model"
    assert describe_callable(module.Network.forward)["function"] == "Network.forward"


# -- calling -----------------------------------------------------------------------------------------------------------


def test_a_value_comes_back():
    assert user_call(lambda a, *, b: a + b, 1, b=2) == 3


def test_our_own_errors_pass_through():
    def refuse():
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        user_call(refuse)


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_what_is_no_fault_passes_through(error):
    def stop():
        raise error

    with pytest.raises(error):
        user_call(stop)


def test_a_fault_deep_in_a_library_still_shows_the_line_of_theirs_that_called_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import json\n\ndef model():\n    return json.loads('{')\n")
    with pytest.raises(UserCodeError) as caught:
        user_call(import_file(path).model)
    assert caught.value.message.startswith("mine.py, line 4, raised JSONDecodeError: Expecting property name")
    assert "return json.loads('{')" in caught.value.message
    assert str(Path(__file__).parents[1] / "mpdeploy") not in caught.value.message


def test_the_cause_of_their_exception_is_shown_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def model():\n    try:\n        {}['a']\n    except KeyError as e:\n        raise ValueError('no a') from e\n"
    )
    with pytest.raises(UserCodeError) as caught:
        user_call(import_file(path).model)
    assert "KeyError: 'a'" in caught.value.message
    assert "ValueError: no a" in caught.value.message


def test_a_module_that_raised_is_not_left_half_loaded(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserCodeError):
        import_file(path)
    assert {name for name in sys.modules if name.startswith("mpdeploy_user_")} <= before
