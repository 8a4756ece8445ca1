"""What we lean on inside the libraries, held against the versions that the lock file names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.model


@pytest.fixture
def trl_utils() -> Iterator[Any]:
    from trl.trainer import utils

    original = utils._use_triton
    yield utils
    utils._use_triton = original


def test_scoring_learned_positions_only_changes_no_loss_and_no_gradient(base_model: Path, trl_utils: Any) -> None:
    """TRL's own head scores every position on a CPU; ours must give the same numbers, for less."""
    import torch

    from stages.model import load_plain
    from stages.train import score_only_learned_positions

    ids = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 8, -100)

    def losses() -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        model = load_plain(base_model, torch.float32)
        trl_utils.add_fused_lm_head(model)
        scored: list[tuple[int, ...]] = []
        kernel = trl_utils._ChunkedLogProbFunction
        original = kernel.apply
        kernel.apply = lambda hidden, *rest: (scored.append(tuple(hidden.shape)), original(hidden, *rest))[1]
        try:
            found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        finally:
            kernel.apply = original
        found.loss.backward()
        return found.log_probs.detach(), model.model.layers[0].mlp.up_proj.weight.grad, scored[0]

    trl_utils._use_triton = lambda _device: False
    everywhere, gradient, all_positions = losses()
    score_only_learned_positions()
    learned, own_gradient, some_positions = losses()
    assert all_positions[0] == 3 * 11
    assert some_positions[0] == 3 * 4
    torch.testing.assert_close(learned, everywhere)
    torch.testing.assert_close(own_gradient, gradient)


def test_no_other_distribution_claims_our_package_names() -> None:
    from importlib.metadata import packages_distributions

    found = packages_distributions()
    for name in ("flows", "stages", "specs"):
        assert set(found.get(name, ["trivium"])) == {"trivium"}


def test_the_lock_file_names_what_is_installed() -> None:
    from importlib.metadata import version

    lock = Path(__file__).parents[2] / "requirements.lock"
    pinned = dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line)
    for library in ("torch", "transformers", "trl", "peft", "prefect", "fastapi", "sqlalchemy", "bitsandbytes"):
        assert version(library).partition("+")[0] == pinned[library]
