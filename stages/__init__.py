"""The vocabulary of stages and the machinery that runs one. Knows nothing of Prefect."""
