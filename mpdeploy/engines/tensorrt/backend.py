"""The two rows of the engine table: TensorRT and TensorRT-RTX, instances of one class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Engine, OnnxModel
from mpdeploy.engines.base import Audit, Layer, Profile, Unavailable
from mpdeploy.engines.options import OptionRow, rows_of
from mpdeploy.engines.tensorrt.audit import layers_from_inspector, tells_nothing
from mpdeploy.engines.tensorrt.build import Progress, build_plan
from mpdeploy.engines.tensorrt.driver import probe_gpu
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, TENSORRT_FAMILY, Family, import_library, library_problem
from mpdeploy.engines.tensorrt.load import engine_information, gpu_problem
from mpdeploy.engines.tensorrt.options import TensorRTOptions
from mpdeploy.engines.tensorrt.runner import TensorRTRunner
from mpdeploy.errors import UnavailableError


class TensorRTBackend:
    """An `EngineBackend` for one library of the family."""

    def __init__(self, family: Family, on_progress: Progress | None = None) -> None:
        self.family = family
        self.name = family.name
        self.on_progress = on_progress

    def with_progress(self, on_progress: Progress) -> TensorRTBackend:
        """The same backend with a callback that is told every build step; returning False from it cancels the build."""
        return TensorRTBackend(self.family, on_progress)

    def option_rows(self) -> tuple[OptionRow, ...]:
        """See `TensorRTOptions`; those that this library lacks, or cannot build with here, say why."""
        lacks = dict(self.family.lacks)
        if isinstance(probe_gpu(), Unavailable):
            lacks |= {name: f"it needs a GPU: {reason}" for name, reason in self.family.lacks_without_gpu.items()}
        return tuple(replace(row, lacking=lacks.get(row.name, "")) for row in rows_of(TensorRTOptions))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the library lacks, and those that need a GPU where there is none."""
        TensorRTOptions.from_mapping(options, self.family, has_gpu=not isinstance(probe_gpu(), Unavailable))

    def available(self) -> Unavailable | None:
        """None where it can build here: the library, and for TensorRT a driver and a GPU too."""
        if self.family.needs_gpu_to_build:
            gpu = probe_gpu()  # first: without a driver nothing else helps
            if isinstance(gpu, Unavailable):
                return Unavailable(f"{self.family.title} builds on a GPU. {gpu.reason}", gpu.hint)
        return library_problem(self.family)

    def can_run(self) -> Unavailable | None:
        """None where its plans run here: the library, a driver, a GPU, and torch with CUDA for the device memory."""
        return self.available() or gpu_problem()

    def takes(self) -> str:
        """FP16: the half precision that every GPU it runs on is fast at."""
        return "fp16"

    def build(self, model: OnnxModel, profile: Profile, options: Mapping[str, Any], folder: Path) -> Engine:
        """Build `model` into `folder` as `engine.plan` and `engine.json`; `options` are those of `TensorRTOptions`.

        Raises:
            BuildError: with the library's own errors and the nodes they name.
            ConfigError: an option or a profile that does not fit.
            UnavailableError: this machine cannot build it.
        """
        gpu = probe_gpu()
        here = None if isinstance(gpu, Unavailable) else gpu
        chosen = TensorRTOptions.from_mapping(options, self.family, has_gpu=here is not None)
        problem = self.available()
        if problem is not None:
            raise UnavailableError(problem.reason, hint=problem.hint)
        return build_plan(
            import_library(self.family),
            self.family,
            model,
            profile,
            chosen,
            folder,
            gpu=here,
            on_progress=self.on_progress,
        )

    def load(self, engine: Engine) -> TensorRTRunner:
        """A runner for a plan that this backend built; nothing runs before `__enter__`."""
        return TensorRTRunner(self.family, engine)

    def audit(self, engine: Engine) -> Audit:
        """The engine inspector's answer where the plan loads here and tells its types, else the parsed network's."""
        network = tuple(Layer.from_json(layer) for layer in engine.sidecar["layers"])
        realised = self._inspected(engine, network)
        return Audit("network", network) if realised is None else Audit("inspector", realised)

    def _inspected(self, engine: Engine, network: tuple[Layer, ...]) -> tuple[Layer, ...] | None:
        if self.can_run() is not None:
            return None
        try:
            text = engine_information(import_library(self.family), self.family, engine)
        except UnavailableError:  # built for another GPU or version: the network is all that can be told here
            return None
        layers = layers_from_inspector(text, network)
        return None if tells_nothing(layers) else layers


TENSORRT = TensorRTBackend(TENSORRT_FAMILY)
TENSORRT_RTX = TensorRTBackend(RTX_FAMILY)
