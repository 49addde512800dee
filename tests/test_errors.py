"""The exception tree: its drawing is true, exit codes are those of the design, and nothing is lost between processes."""

from __future__ import annotations

import pickle
import re

import pytest

from mpdeploy import errors
from mpdeploy.errors import MissingExtraError, MpdeployError, closest_names

DRAWN = dict(re.findall(r"[├└]── (\w+Error)\s+(\d+)", errors.__doc__ or ""))
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, MpdeployError) and value is not MpdeployError
}


def test_the_drawing_holds_every_class_and_its_exit_code():
    assert {name: int(code) for name, code in DRAWN.items()} == {name: kind.exit_code for name, kind in CLASSES.items()}


def test_exit_codes_are_those_of_the_design():
    assert {kind.exit_code for kind in CLASSES.values()} == {2, 10, 11, 12, 20, 21}


@pytest.mark.parametrize("kind", CLASSES.values())
def test_an_error_crosses_a_process_with_its_hint(kind):
    back = pickle.loads(pickle.dumps(kind("what, where", hint="do this")))
    assert (type(back), back.message, back.hint) == (kind, "what, where", "do this")


def test_the_text_shows_the_hint_below_the_message():
    assert str(MpdeployError("what", hint="do this")) == "what\n\nhint: do this"
    assert str(MpdeployError("what")) == "what"


def test_a_missing_extra_names_the_command_that_installs_it():
    assert MissingExtraError.for_extra("openvino", "cpu").hint == "pip install 'mpdeploy[cpu]'"


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("epoch", ["epochs", "batch_size", "seed"], "epochs"),
        ("xyz", ["epochs", "batch_size", "seed", "device"], "epochs, batch_size, seed"),
        ("xyz", [], "(there are none)"),
        ("seed", ["seed", "seed", "seeds"], "seed, seeds"),
    ],
)
def test_the_closest_names_come_first_and_some_are_shown_where_none_is_close(name, names, expected):
    assert closest_names(name, names) == expected
