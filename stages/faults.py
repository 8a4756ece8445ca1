"""What a library's exception means to a person: what ran out or broke, and what to do about it."""

_OUT_OF_MEMORY = (
    "out of memory; lower train.micro_batch_size (batch_size stays), lower train.sequence_length, or set "
    "train.gradient_checkpointing, then run again: it resumes"
)


def explain(error: Exception) -> str:
    """The reason for people, of an exception that is none of ours."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return _OUT_OF_MEMORY
    return f"{type(error).__name__}: {error}"[:2000]
