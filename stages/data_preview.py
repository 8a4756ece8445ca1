"""The data report without training: ``python -m stages.data_preview``, for `trivium data`.

A request on stdin names the spec, the stages and the folder of the base, of which only the tokenizer is loaded; the
last line on stdout is the answer: a report for each stage, as `stages.data_report` documents it, or what is wrong.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data_limits import Report, refusals
from stages.data_report import Material, make_report
from stages.errors import TriviumError
from stages.mixing import mixed
from stages.model import load_tokenizer
from stages.objective import ObjectiveSpec
from stages.pipeline import Pipeline
from stages.preemption import die_with
from stages.remote_code import allowing
from stages.template import dated, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(pipeline: Pipeline, folder: Path, base: Path, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The report of each wanted stage, and what its run would be refused for.

    Args:
        pipeline: the spec.
        folder: what paths in the spec start from.
        base: the folder of the base, prepared or as the spec names it.
        wanted: names of stages.

    Raises:
        InvalidInput: rows that cannot be used, or nothing to learn in any of a stage's.
    """
    tokenizer = load_tokenizer(base)
    if pipeline.model.chat_template is not None:
        tokenizer.chat_template = read_template(folder / pipeline.model.chat_template)
    stages = [stage for stage in pipeline.stages if stage.name in wanted]
    found = []
    for stage in stages:
        report = _report(pipeline, folder, stage, tokenizer)
        found.append({"report": report, "refused": refusals(report, stage.data_limits)})
    return found


def _report(pipeline: Pipeline, folder: Path, stage: ObjectiveSpec, tokenizer: "PreTrainedTokenizerBase") -> Report:
    seed = pipeline.seed_of(stage)
    mixture = mixed(stage.data, folder, stage.normalise, seed, lambda own: stage.sizes(own, tokenizer))
    dataset, masks = stage.dataset(mixture.rows, tokenizer)
    masks.checked(stage.name, mixture.counts)
    return make_report(Material(stage, pipeline.metrics_in_full, folder, mixture, dataset, masks, tokenizer))


def main() -> int:
    """Answer the request on stdin."""
    die_with(os.getppid())
    request = json.loads(sys.stdin.read())
    pipeline = Pipeline.model_validate_json(json.dumps(request["pipeline"]))
    model = pipeline.model
    answer: dict[str, Any]
    try:
        with allowing(model.allow_remote_code), dated(model.template_date):
            places = Path(request["folder"]), Path(request["base"])
            answer = {"stages": preview(pipeline, *places, request["stages"])}
    except TriviumError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(answer))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
