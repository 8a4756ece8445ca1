"""Spectrum: full fine-tuning of the weight matrices with the highest signal-to-noise ratio.

Hartford et al., "Spectrum: Targeted Training on Signal to Noise Ratio", arXiv 2406.06623. A high score of the
reference does not say "much signal": see `stages.scan.score`, and hold a result against `random_subset` and
`top_layers` before you believe in a selection.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.errors import InvalidInput
from stages.layout import Key, Matrix, identify, read_layout, spellings
from stages.methods.base import MethodSpec, Prepared, Start
from stages.methods.parts import embeddings, model_matrices, train_matrices, whole_again

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Table = dict[Key, dict[str, Any]]
"""What is known of each matrix: module, type, layer, snr, snr_mp and, after a scan, counts of noise values."""


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

    def unsupported(self, config: dict[str, Any]) -> str | None:
        """Quantised weights have another spectrum and cannot be trained."""
        if config.get("quantization_config"):
            return "method spectrum trains whole weights, and those of this model are quantised; use qlora"
        return None

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Rank the model's matrices and unfreeze the best of each module type."""
        own = model_matrices(model)
        if self.unfrozen is not None:
            chosen, also = self._listed(model, own, start)
            return Prepared(model, train_matrices(model, chosen, also), {"unfrozen": [*also, *_modules(chosen)]})
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

    def _table(self, model: "PreTrainedModel", own: tuple[Matrix, ...], start: Start) -> Table:
        """The scores of the model's matrices: from the file, or from a scan of the start's files."""
        if self.scores is not None:
            return _from_file(start.spec_folder / self.scores, model, own, self.score)
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

    def _best(self, own: tuple[Matrix, ...], table: Table) -> tuple[dict[Key, int], list[Matrix]]:
        """Each matrix's place within its type, and the matrices whose place is high enough."""
        from stages.scan.select import ranks, top

        column = "snr" if self.score == "reference" else "snr_mp"
        # In the table's order: equal scores rank as they came, as they do in the reference.
        by_key = {matrix.key: matrix for matrix in own}
        matrices = [by_key[key] for key in table]
        places = ranks(matrices, lambda matrix: float(table[matrix.key][column]))
        return places, top(matrices, places, self.top_percent)

    def _listed(
        self, model: "PreTrainedModel", own: tuple[Matrix, ...], start: Start
    ) -> tuple[list[Matrix], list[str]]:
        """The matrices and other parameters that the YAML file names."""
        from stages.scan.files import matching, read_patterns

        file = start.spec_folder / str(self.unfrozen)
        names = _names(model, own)
        targets = matching(read_patterns(file), names, file)
        chosen = [matrix for matrix in own if matrix.module in targets]
        if len(chosen) == len(own):
            raise InvalidInput(f"{file}: names every weight matrix of this model; use method full, or name fewer")
        return chosen, sorted(targets - set(_modules(own)))


def _modules(found: "tuple[Matrix, ...] | list[Matrix]") -> list[str]:
    return [matrix.module for matrix in found]


def _names(model: "PreTrainedModel", own: tuple[Matrix, ...]) -> dict[str, frozenset[str]]:
    """What a pattern may match -> what it then means: modules of matrices, names of other parameters."""
    inside: dict[str, list[str]] = {}
    for matrix in own:
        inside.setdefault(matrix.tensor, []).append(matrix.module)
    names: dict[str, frozenset[str]] = {}
    for parameter, _ in model.named_parameters():
        meant = frozenset(inside.get(parameter, [parameter]))
        names[parameter] = names[parameter.removesuffix(".weight")] = meant
    for matrix in own:
        for spelling in spellings(matrix):
            names[spelling] = names[f"{spelling}.weight"] = frozenset([matrix.module])
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:  # a tied head has no parameter of its own; lists name it nevertheless
            meant = frozenset(set(embeddings(model)) if f"{name}.weight" not in names else [f"{name}.weight"])
            names[name] = names[f"{name}.weight"] = meant
    return names


def _from_file(file: Any, model: "PreTrainedModel", own: tuple[Matrix, ...], score: str) -> Table:
    """The scores in a JSON file, held against the model.

    A score of a fused projection stands for all its parts. Types that the file leaves out do not train.
    """
    from stages.scan.files import read_scores

    found = {identify(module): (module, known) for module, known in read_scores(file).items()}
    found.pop(None, None)  # embeddings and the last norm are not ranked
    keys = {identify(name.removesuffix(".weight")) for name, _ in model.named_parameters()}
    keys |= {matrix.key for matrix in own}
    stranger = next((module for key, (module, _) in found.items() if key not in keys), None)
    if stranger is not None:
        raise InvalidInput(f"{file}: scores {stranger}, which this model does not have; scan this model itself")
    table: Table = {}
    order = {key: number for number, key in enumerate(found)}
    for matrix in sorted(own, key=lambda one: order.get(_in(found, one), 0)):
        if (key := _in(found, matrix)) in found:
            _, known = found[key]
            row = {"module": matrix.module, "type": matrix.type, "layer": matrix.layer, **known._asdict()}
            if row["snr" if score == "reference" else "snr_mp"] is None:
                raise InvalidInput(f"{file}: holds no {score} scores; `trivium scan` writes both into scan.json")
            table[matrix.key] = row
    _check_complete(file, own, table)
    return table


def _in(found: dict[Any, Any], matrix: Matrix) -> Key:
    """The key under which a file scores a matrix: its own, or that of the fused projection it is a part of."""
    layer, kind, expert = matrix.key
    return matrix.key if matrix.key in found or matrix.part is None else (layer, kind.rsplit(".", 1)[0], expert)


def _check_complete(file: Any, own: tuple[Matrix, ...], table: Table) -> None:
    if not table:
        raise InvalidInput(f"{file}: scores none of this model's weight matrices; scan this model itself")
    kinds = {kind for _, kind, _ in table}
    missing = next((matrix for matrix in own if matrix.type in kinds and matrix.key not in table), None)
    if missing is not None:
        raise InvalidInput(f"{file}: has no score for {missing.module}; scan this model itself")
