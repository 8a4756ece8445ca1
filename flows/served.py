"""Serving runs: one process that starts the scheduled ones, and ends what it started when it is told to stop."""

import asyncio
import multiprocessing
from typing import Any

from prefect.runner import Runner

from flows.pipeline import pipeline


def serve(name: str, **deployment: Any) -> None:
    """Serve runs of the pipeline under a name until SIGTERM or Ctrl-C, as `pipeline.serve` does.

    Set the environment first (`flows.server.use_project_server`), then import this.

    Args:
        name: The deployment's name.
        **deployment: Schedules, parameters and what else `prefect.runner.Runner.add_flow` takes.
    """
    runner = _Runner(name=name)
    runner.add_flow(pipeline, name=name, **deployment)
    asyncio.run(runner.start())


class _Runner(Runner):
    """Prefect 3.8's own leaves its runs alone on SIGTERM and then waits for them, for hours maybe."""

    def handle_sigterm(self, *arguments: Any, **settings: Any) -> None:
        """Tell the runs to stop: they save, end with their trees, and leave no state that says Running."""
        for run in multiprocessing.active_children():
            run.terminate()
        super().handle_sigterm(*arguments, **settings)
