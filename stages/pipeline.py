"""The pipeline with its stages: the registry of objectives, and the whole spec as one type."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from specs.load import Document, SpecError, read
from specs.pipeline import PipelineSpec
from stages.cpt import Cpt
from stages.dpo import Dpo
from stages.ift import Ift

Stage = Annotated[Cpt | Ift | Dpo, Field(discriminator="kind")]
"""THE registry of objectives."""


class Pipeline(PipelineSpec[Stage]):
    """A spec file, closed over the stages that exist."""


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


def schema_text() -> str:
    """The JSON Schema of a spec file, as editors read it: one text, ending in a newline."""
    return json.dumps(Pipeline.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
