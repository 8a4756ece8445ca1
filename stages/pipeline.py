"""The pipeline with its stages: the registry of objectives, and the whole spec as one type."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from specs.load import Document, SpecError, read
from specs.metric import JudgeSpec, LmEvalSpec
from specs.pipeline import Location, PipelineSpec
from stages.cpt import Cpt
from stages.dpo import Dpo
from stages.errors import InvalidInput
from stages.ift import Ift
from stages.interval import LEAST_DOUBT
from stages.metrics.harness import is_task_file

Stage = Annotated[Cpt | Ift | Dpo, Field(discriminator="kind")]
"""THE registry of objectives."""


class Pipeline(PipelineSpec[Stage]):
    """A spec file, closed over the stages that exist."""

    def problems(self) -> list[tuple[Location, str]]:
        """What is wrong between the parts, and what a stage asks of a method that cannot do it."""
        return [*super().problems(), *self._methods(), *self._doubts()]

    @property
    def is_offline(self) -> bool:
        """Whether nothing in the spec is on the Hugging Face hub, so that no process of it has to reach the network."""
        metrics = list(self.metrics.values())
        sources = [source for _, stage in self.placed_stages() for source in stage.data]
        sources += [metric.data for metric in metrics if not isinstance(metric, LmEvalSpec | JudgeSpec)]
        tasks = [metric.task for metric in metrics if metric.kind == "lm_eval"]
        named = any(source.hub is not None for source in sources) or not all(map(is_task_file, tasks))
        judges = [metric.model for metric in metrics if metric.kind == "judge" and metric.model is not None]
        return not any(model.hub is not None for model in (self.model, *judges)) and not named

    def _methods(self) -> Iterator[tuple[Location, str]]:
        for place, stage in self.placed_stages():
            method, train = stage.method, stage.train
            if not method.mergeable and place[1] != len(self.stages) - 1:
                yield (
                    (*place, "method", "kind"),
                    f"what method {method.kind} trains cannot be merged into a plain model, so no stage can follow: "
                    "make this the last stage, or take a method that merges, such as lora, dora or spectrum",
                )
            # `wrapped` lets neighbours see one another on purpose, whatever the method.
            if not method.packs and getattr(train, "packing", None) in (True, "split"):
                off = "false" if stage.kind == "ift" else "none"
                yield (
                    (*place, "method", "kind"),
                    f"with method {method.kind}, documents that share a packed sequence would see one another; set "
                    f"train.packing: {off}",
                )
            if not method.recomputes and train.gradient_checkpointing:
                yield (
                    (*place, "train", "gradient_checkpointing"),
                    f"method {method.kind} cannot recompute activations (its keys are put in front of each layer's); "
                    "remove gradient_checkpointing, or use prompt_tuning or bottleneck",
                )

    def _doubts(self) -> Iterator[tuple[Location, str]]:
        """Gates that ask of each attempt for more confidence than resamples can tell."""
        for number, stage in enumerate(self.stages):
            attempts = 1 + len(stage.changes)
            for gate_number, gate in enumerate(stage.gates):
                if gate.confidence is None or (1 - gate.confidence) / attempts >= LEAST_DOUBT * (1 - 1e-9):
                    continue
                yield (
                    ("stages", number, "gates", gate_number, "confidence"),
                    f"{attempts} attempts share the doubt of {100 * gate.confidence:.4g}%, and each would be judged at "
                    f"{100 - 100 * (1 - gate.confidence) / attempts:.4f}%, beyond what can be told from resamples "
                    f"({100 - 100 * LEAST_DOUBT:.4g}%): plan fewer attempts, or lower the confidence",
                )


def load_pipeline(path: Path) -> tuple[Pipeline, Document]:
    """Read and validate a spec file.

    Raises:
        SpecError: everything that is wrong with it, each by line and column.
    """
    document = read(path)
    pipeline = document.validate(Pipeline)
    problems = [document.problem(where, message) for where, message in pipeline.problems()]
    if problems:
        raise SpecError(problems)
    return pipeline, document


def spec_as_run(pipeline: Pipeline, path: Path) -> str:
    """The spec that a pipeline was read from: the file as it stands, unless somebody has edited it since."""
    try:
        if load_pipeline(path)[0] == pipeline:
            return path.read_text(encoding="utf-8")
    except (SpecError, InvalidInput, OSError):
        pass
    return pipeline.model_dump_json(indent=1, exclude_unset=True)


def schema_text() -> str:
    """The JSON Schema of a spec file, as editors read it: one text, ending in a newline."""
    return json.dumps(Pipeline.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
