"""The grammar of a Trivium spec: pydantic models and YAML only. Imports nothing of ours."""
