"""The build options: what is refused, and in which words."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mpdeploy.engines.tensorrt.library import RTX_FAMILY, TENSORRT_FAMILY
from mpdeploy.engines.tensorrt.options import TensorRTOptions
from mpdeploy.errors import ConfigError, UnavailableError


def read(options, family=TENSORRT_FAMILY, *, has_gpu=True):
    return TensorRTOptions.from_mapping(options, family, has_gpu=has_gpu)


def test_no_option_is_the_default():
    assert read({}) == TensorRTOptions()
    assert TensorRTOptions().tf32 is False


def test_an_unknown_option_is_refused_with_the_closest_names():
    with pytest.raises(ConfigError, match="TensorRT has no build option 'workspace'") as caught:
        read({"workspace": 1})
    assert "workspace_bytes" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workspace_bytes", 0),
        ("workspace_bytes", 1.5),
        ("workspace_bytes", True),
        ("builder_level", 6),
        ("builder_level", -1),
        ("tf32", "yes"),
        ("refit", 1),
        ("hardware_compatible", "turing"),
        ("hardware_compatible", True),
        ("compute_capabilities", ["8.9"]),
        ("timing_cache", 3),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"The build option {name} is") as caught:
        read({name: value})
    assert caught.value.hint


def test_a_readonly_timing_cache_needs_a_timing_cache():
    with pytest.raises(ConfigError, match="no timing_cache to read"):
        read({"timing_cache_readonly": True})


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        (RTX_FAMILY, "version_compatible", True),
        (RTX_FAMILY, "hardware_compatible", "ampere_plus"),
        (RTX_FAMILY, "timing_cache", "cache.bin"),
        (TENSORRT_FAMILY, "compute_capabilities", ["SM89"]),
    ],
)
def test_an_option_of_the_other_library_is_refused(family, option, value):
    with pytest.raises(ConfigError, match=f"{family.title} has no option '{option}'"):
        read({option: value}, family)
    other = RTX_FAMILY if family is TENSORRT_FAMILY else TENSORRT_FAMILY
    assert getattr(read({option: value}, other), option)


def test_refit_needs_a_gpu_in_tensorrt_rtx_only():
    with pytest.raises(UnavailableError, match="needs a GPU to build with 'refit'"):
        read({"refit": True}, RTX_FAMILY, has_gpu=False)
    assert read({"refit": True}, RTX_FAMILY).refit
    assert read({"refit": True}, TENSORRT_FAMILY, has_gpu=False).refit


def test_the_options_go_into_json_and_back():
    options = read({"compute_capabilities": ["SM80", "SM120"], "builder_level": 5}, RTX_FAMILY)
    assert TensorRTOptions.from_mapping(options.to_json(), RTX_FAMILY, has_gpu=True) == options
    assert set(options.to_json()) == {option.name for option in fields(TensorRTOptions)}
