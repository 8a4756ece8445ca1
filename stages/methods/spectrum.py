"""Spectrum: full fine-tuning of the weight matrices with the highest signal-to-noise ratio.

Hartford et al., "Spectrum: Targeted Training on Signal to Noise Ratio", arXiv 2406.06623. A high score of the
reference does not say "much signal": see `stages.scan.score`, and hold a result against `random_subset` and
`top_layers` before you believe in a selection.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.errors import InvalidInput
from stages.layout import Key, Layout, Matrix, read_layout
from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.parts import embeddings, model_matrices, train_matrices, whole_again
from stages.paths import irregular

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.methods.spectrum_files import Table, Weights


class Spectrum(MethodSpec):
    """Train the top share of the weight matrices of each module type, by signal-to-noise ratio."""

    kind: Literal["spectrum"]
    top_percent: Annotated[float, Field(gt=0, le=100)] = 25.0
    """Share of the matrices of each module type that train, at least one; norms and biases never do."""
    score: Literal["reference", "marchenko_pastur"] = "reference"
    """What ranks the matrices: the published code's score, or one with the noise edge that theory gives."""
    embeddings: bool = False
    """Train the input embedding and the output head too, as the lists of the published code do."""
    scores: str | None = None
    """A JSON file of scores in place of a scan, of ``trivium scan`` or published with Spectrum."""
    unfrozen: str | None = None
    """A YAML file with a list ``unfrozen_parameters`` that decides alone what trains."""

    version = 2
    checkpoints_whole = True

    @model_validator(mode="after")
    def _one_source(self) -> "Spectrum":
        """A list of names leaves nothing to rank."""
        beside = {"top_percent", "score", "embeddings", "scores"} & self.model_fields_set
        if self.unfrozen is not None and beside:
            raise ValueError(
                f"unfrozen names what trains, so {', '.join(sorted(beside))} would have no effect: remove it"
            )
        return self

    def files(self) -> tuple[str, ...]:
        """The files that replace a scan."""
        return tuple(name for name in (self.scores, self.unfrozen) if name is not None)

    def file_problems(self, folder: Path, layout: Layout | None) -> Iterator[tuple[str, str]]:
        """A file that is missing, holds no scores or names, or belongs to another model."""
        for field in ("scores", "unfrozen"):
            name = getattr(self, field)
            if name is not None and (problem := self._file_problem(field, name, folder, layout)):
                yield field, problem

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Quantised weights have another spectrum and cannot be trained."""
        if config.get("quantization_config"):
            return "method spectrum trains whole weights, and those of this model are quantised; use qlora"
        return None

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Rank the model's matrices and unfreeze the best of each module type."""
        own = model_matrices(model)
        if self.unfrozen is not None:
            from stages.methods.spectrum_files import listed_in, modules

            chosen, also = listed_in(start.spec_folder / self.unfrozen, _weights(model, own))
            return Prepared(model, train_matrices(model, chosen, also), {"unfrozen": [*also, *modules(chosen)]})
        table = self._table(model, own, start)
        places, chosen = self._best(own, table)
        also = embeddings(model) if self.embeddings else []
        selected = {matrix.key for matrix in chosen}
        rows = [row | {"rank": places[key], "selected": key in selected} for key, row in table.items()]
        record: dict[str, object] = {"spectrum": rows, "score": self.score, "also": also}
        return Prepared(model, train_matrices(model, chosen, also), record)

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Put parts of fused projections back; whole matrices are the model's own."""
        return whole_again(model)

    def _file_problem(self, field: str, name: str, folder: Path, layout: Layout | None) -> str | None:
        """Why a file cannot take the place of a scan; without a layout only its own form is looked at."""
        if not name:
            return "names no file; remove it, or give the path of one"
        file = folder / name
        if problem := irregular(file):
            return problem
        from stages.methods.spectrum_files import listed_in, scores_of, stored_weights
        from stages.scan.files import read_patterns, read_scores

        try:
            if field == "scores":
                read_scores(file) if layout is None else scores_of(file, stored_weights(layout), self.score)
            else:
                read_patterns(file) if layout is None else listed_in(file, stored_weights(layout))
        except InvalidInput as error:
            return str(error)
        return None

    def _table(self, model: "PreTrainedModel", own: tuple[Matrix, ...], start: Start) -> "Table":
        """The scores of the model's matrices: from the file, or from a scan of the start's files."""
        if self.scores is not None:
            from stages.methods.spectrum_files import scores_of

            return scores_of(start.spec_folder / self.scores, _weights(model, own), self.score)
        if model.device.type == "meta":  # to count, any matrices do: those of a type are of one size
            return {matrix.key: {"snr": 0.0, "snr_mp": 0.0} for matrix in own}
        from stages.log import info
        from stages.scan.files import as_row
        from stages.scan.walk import scan, warnings

        layout = read_layout(start.model)
        scored = scan(layout, start.cache)
        for line in warnings(scored, self.score):
            info(f"spectrum: {line}")
        found = {one.matrix.key: as_row(one) for one in scored}
        strangers = found.keys() ^ {matrix.key for matrix in own}
        if strangers:
            layer, kind, _ = min(strangers, key=str)
            raise InvalidInput(
                f"{start.model}: its files and the loaded model do not hold the same matrices: {kind} of layer "
                f"{layer} is in one of them only; use method full for this architecture"
            )
        return found

    def _best(self, own: tuple[Matrix, ...], table: "Table") -> tuple[dict[Key, int], list[Matrix]]:
        """Each matrix's place within its type, and the matrices whose place is high enough."""
        from stages.scan.select import ranks, top

        column = "snr" if self.score == "reference" else "snr_mp"
        # In the table's order: equal scores rank as they came, as they do in the reference.
        by_key = {matrix.key: matrix for matrix in own}
        matrices = [by_key[key] for key in table]
        places = ranks(matrices, lambda matrix: float(table[matrix.key][column]))
        return places, top(matrices, places, self.top_percent)


def _weights(model: "PreTrainedModel", own: tuple[Matrix, ...]) -> "Weights":
    """A loaded model's weights as files are held against them."""
    from stages.methods.spectrum_files import Weights

    head = model.get_output_embeddings()
    heads = tuple(name for name, module in model.named_modules() if module is head)
    return Weights(own, tuple(name for name, _ in model.named_parameters()), tuple(embeddings(model)), heads)
