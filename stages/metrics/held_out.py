"""What the held-out rows of a metric look like, for whoever reads them without measuring."""

from specs.metric import GenerationSpec, PerplexitySpec, PreferenceSpec
from stages.data import Normaliser
from stages.metrics.generation import prompt_schema
from stages.rows import any_scored_row, preference_row


def row_schema(spec: PerplexitySpec | PreferenceSpec | GenerationSpec) -> Normaliser:
    """What normalises a row of the metric, as the metric itself reads it."""
    if isinstance(spec, GenerationSpec):
        schema: Normaliser = prompt_schema(spec)
        return schema
    return preference_row if isinstance(spec, PreferenceSpec) else any_scored_row
