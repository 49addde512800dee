"""The one logger of a library, and signals held while native code runs."""

from __future__ import annotations

import signal
import threading

import pytest

from mpdeploy.engines.tensorrt import TENSORRT_RTX
from mpdeploy.engines.tensorrt.library import import_library
from mpdeploy.engines.tensorrt.log import Lines, collected_lines, deferred_signals, without_noise

_PROBLEM = TENSORRT_RTX.available()
needs_rtx = pytest.mark.skipif(_PROBLEM is not None, reason=_PROBLEM.reason if _PROBLEM else "")


@needs_rtx
def test_each_listener_hears_what_is_logged_while_it_listens():
    trt = import_library(TENSORRT_RTX.family)
    severity = trt.ILogger.Severity
    with collected_lines(trt) as (logger, outer):
        with collected_lines(trt) as (same, inner):
            assert same is logger  # the library would ignore a second one
            logger.log(severity.WARNING, "early")
        logger.log(severity.ERROR, "late")
        logger.log(severity.INFO, "chatter")
        assert (inner.errors, inner.warnings) == ([], ["early"])
        assert (outer.errors, outer.warnings) == (["late"], ["early"])
    assert logger.listeners == []


@needs_rtx
def test_a_listener_that_leaves_early_does_not_take_an_equal_one_with_it():
    trt = import_library(TENSORRT_RTX.family)
    first, second = collected_lines(trt), collected_lines(trt)
    logger, _ = first.__enter__()
    _, kept = second.__enter__()
    first.__exit__(None, None, None)
    logger.log(trt.ILogger.Severity.ERROR, "heard")
    second.__exit__(None, None, None)
    assert kept.errors == ["heard"]


def test_the_noise_of_a_missing_driver_is_left_out_unless_it_is_all_there_is():
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"
    assert without_noise(f"the cause\n{noise}") == "the cause"
    assert without_noise(noise) == noise
    assert Lines(errors=["twice", "twice"]).text() == "twice"
    assert Lines().text() == "the library gave no reason"


def test_a_signal_is_held_until_the_block_ends():
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def work() -> None:
        with deferred_signals() as came:
            seen.append(came())
            signal.raise_signal(signal.SIGINT)
            seen.append(came())

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_may_build_and_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with deferred_signals() as came:
            seen.extend([came(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]
