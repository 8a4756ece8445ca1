"""When and where stages run: Prefect, processes and the command line. Never imports torch."""
