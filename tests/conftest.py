"""Settings that must be there before the heavy libraries are imported, and the models that many tests share."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

_CACHE = Path(tempfile.mkdtemp(prefix="trivium-tests-"))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(_CACHE / "hub"),
    "HF_DATASETS_CACHE": str(_CACHE / "datasets"),
    "MPLCONFIGDIR": str(_CACHE / "matplotlib"),
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


_DEPRECATIONS = (
    # torch.jit.script_method in a dependency of ours; where it was called from is not in the warning
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning:torch.jit._script",
    # PEFT 0.21 reads the old name of a property of transformers 5.23
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils",
)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in _DEPRECATIONS:
        config.addinivalue_line("filterwarnings", line)


def pytest_sessionfinish() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_state_between_tests(request: pytest.FixtureRequest) -> None:
    """One thread and one seed in every test that computes."""
    if request.node.get_closest_marker("model") is not None:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by name: `untied` and `tied`, with weights as large as trained ones. Read only."""
    import torch
    from tiny import write_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name in ("untied", "tied"):
        found[name] = write_model(folder / name, tied=name == "tied", layers=4)
        model = AutoModelForCausalLM.from_pretrained(found[name], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)  # as drawn, attention is uniform and logits are near zero
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def base_model(models: dict[str, Path]) -> Path:
    """A tiny model's folder. Read only."""
    return models["untied"]


@pytest.fixture(scope="session")
def run_spec() -> Callable:
    """A function that brings a spec up to date in this process, as `flows.engine` does it with children.

    `until` names the last step to run; returns the plan as it stands afterwards.
    """
    from stages.pipeline import load_pipeline
    from stages.plan import make_plan
    from stages.run import run_job

    def run(spec: Path, until: str | None = None, **settings):
        pipeline, _ = load_pipeline(spec)

        def plan():
            return make_plan(pipeline, spec.parent.resolve(), spec.parent / "runs")

        for number, step in enumerate(plan().steps):
            now = plan()
            if now.steps[number] in now.pending:
                run_job(now.job(now.steps[number]), **settings)
            if step.name == until:
                break
        return plan()

    return run


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, run_spec: Callable):
    """The plan of the tiny project after it ran to its release. Read only."""
    from tiny import write_project

    return run_spec(write_project(tmp_path_factory.mktemp("chain") / "project"))
