"""Chat templates: small programs that come with a model, held to a date, a time and a size.

transformers renders them in a sandbox that lets nothing out. It does not end a loop, cap what a template writes or
stop the clock: a template that asks for today's date would make the training text depend on the day of the run. So
every rendering of a process, by whomever asked for, is `bounded`, and sees the date that `dated` gives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import wraps
from pathlib import Path
from typing import Any

from stages.bounds import bounded
from stages.documents import read_json
from stages.errors import InvalidInput

CHARACTERS = 1 << 24
"""Length of the longest text that one conversation may become."""
LONGEST = 1 << 20
"""Characters of the longest template; real ones have some thousands."""
CLOCK = "strftime_now"
"""The function by which a template asks for today's date."""
REMEDY = "look at the template, or name another one in the spec (model.chat_template)"

_date: date | None = None
_dated = False


def folder_templates(model: Path) -> list[tuple[Path, str]]:
    """The chat templates of a checkpoint, each with its file; without importing anything heavy.

    Raises:
        InvalidInput: a file that should hold one cannot be read.
    """
    found = [(file, read_template(file)) for file in sorted(model.glob("*.jinja"))]
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = model / name
        settings = read_json(file) if file.is_file() else None
        kept = settings.get("chat_template") if isinstance(settings, dict) else None
        texts = [one.get("template") for one in kept if isinstance(one, dict)] if isinstance(kept, list) else [kept]
        found += [(file, text) for text in texts if isinstance(text, str)]
    return found


def read_template(file: Path) -> str:
    """The text of a template's file.

    Raises:
        InvalidInput: it cannot be read, is no text, or is too long.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: not a template that can be read: {error}") from error
    if len(text) > LONGEST:
        raise InvalidInput(f"{file}: longer than {LONGEST:,} characters; no chat template is; name another file")
    return text


def check_template(file: Path, text: str, fixed: date | None) -> None:
    """Refuse a template that does not parse, or that asks for a date which the spec does not give.

    Raises:
        InvalidInput: with the line and what to do.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """The block that transformers adds to Jinja: it marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    try:
        tree = Environment(extensions=[Generation, loopcontrols]).parse(text)  # noqa: S701 - parsed, never rendered
        asks = CLOCK in text and CLOCK in meta.find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        raise InvalidInput(f"{file}:{error.lineno}: not a Jinja template: {error.message}; {REMEDY}") from error
    except RecursionError as error:
        raise InvalidInput(f"{file}: nested too deep for a Jinja template; {REMEDY}") from error
    if asks and fixed is None:
        line = text[: text.index(CLOCK)].count("\n") + 1
        raise InvalidInput(f"{file}:{line}: {_undated()}")


def _undated() -> str:
    return (
        f"the chat template asks for today's date ({CLOCK}), and what a model learns must not depend on the day of the "
        "run; give the date that training and evaluation see (model.template_date: 2026-01-31)"
    )


@contextmanager
def dated(fixed: date | None) -> Iterator[None]:
    """Let every template see one date, whatever the clock says; without one, a template that asks is refused."""
    global _date, _dated
    before = _date, _dated
    _date, _dated = fixed, True
    try:
        yield
    finally:
        _date, _dated = before


def _strftime(pattern: str) -> str:
    """What a template gets for `strftime_now`."""
    if _date is not None:
        return datetime.combine(_date, time()).strftime(pattern)
    if _dated:
        raise InvalidInput(_undated())
    # Outside of a job, for who talks to a model: the day is today, as everywhere else where it is served.
    return datetime.now().strftime(pattern)


def bind_renderings() -> None:
    """Bound every rendering of a chat template in this process: ours, the trainer library's, the harness's."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils as own

    plain, compiled = PreTrainedTokenizerBase.apply_chat_template, own._cached_compile_jinja_template
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def apply_chat_template(*given: Any, **settings: Any) -> Any:
        with bounded("the chat template", REMEDY):
            found = plain(*given, **settings)
        if isinstance(found, str) and len(found) > CHARACTERS:
            raise InvalidInput(f"the chat template makes {len(found):,} characters of one conversation; {REMEDY}")
        return found

    def with_our_clock(text: str) -> Any:
        # Not as a variable of the rendering: transformers turns whatever it passes to a template into plain values.
        template = compiled(text)
        template.environment.globals[CLOCK] = _strftime
        return template

    PreTrainedTokenizerBase.apply_chat_template = apply_chat_template
    own._cached_compile_jinja_template = with_our_clock
    own._compile_jinja_template.cache_clear()
