"""A judge behind HTTP: chat completions as OpenAI's interface has them, asked several at a time, each reply kept."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import EndpointSpec
from specs.printable import printable_line
from specs.secrets import redact
from stages.errors import InvalidInput, StageFailed, TryAgain
from stages.log import event
from stages.metrics.judge import Ask

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of servers that are busy or away for a moment."""
_LETTER = re.compile(r"(?<![A-Za-z])[ABC](?![A-Za-z])")
_LONGEST_WAIT = 60.0
_SHOWN = 200
"""Characters of a server's words in a message."""


def endpoint_judge(spec: EndpointSpec, label: str, cache: Path, environment: Mapping[str, str]) -> Ask:
    """A judge that is asked over the network.

    Replies are kept in ``cache`` as they come, by a hash of all that was sent: a crash, a spec that is edited or a
    measurement that is made anew does not pay for them twice.

    Args:
        spec: where the judge is.
        label: what progress and messages call the metric.
        cache: a folder.
        environment: holds the key.

    Raises:
        InvalidInput: the key is missing; by the returned function, the server refuses the key, model or request.
        TryAgain: by the returned function: the server does not answer, or has no room, however often it was asked.
    """
    headers = _headers(spec, label, environment)
    file = cache / f"{_digest([spec.url, spec.model, spec.parameters])[:16]}.jsonl"

    def ask(questions: Sequence[str]) -> list[str | None]:
        import httpx

        known = _read(file)
        keys = [_digest(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        cache.mkdir(parents=True, exist_ok=True)
        with (
            httpx.Client(headers=headers, timeout=spec.timeout, follow_redirects=False) as client,
            file.open("a", encoding="utf-8") as kept,
            ThreadPoolExecutor(spec.concurrency) as pool,
        ):
            waiting = {pool.submit(_reply, client, spec, label, question): key for key, question in missing.items()}
            try:
                for one in as_completed(waiting):
                    known[waiting[one]] = one.result()
                    # A line begins by itself: the one before it may have been torn.
                    kept.write("\n" + json.dumps({"key": waiting[one], "reply": one.result()}) + "\n")
                    kept.flush()
                    done = len(keys) - len(missing) + sum(future.done() for future in waiting)
                    event("measuring", metric=label, done=done, total=len(keys))
            finally:
                for one in waiting:
                    one.cancel()
        return [_letter(known[key]) for key in keys]

    return ask


def missing_key(spec: EndpointSpec, environment: Mapping[str, str]) -> str | None:
    """That the environment does not hold the key that an endpoint needs; None where it does, or none is needed."""
    if spec.key is None or environment.get(spec.key):
        return None
    return f"the environment has no {spec.key}, which should hold the key for {spec.url}: export it first"


def _headers(spec: EndpointSpec, label: str, environment: Mapping[str, str]) -> dict[str, str]:
    if problem := missing_key(spec, environment):
        raise InvalidInput(f"metric {label}: {problem}")
    return {} if spec.key is None else {"Authorization": f"Bearer {environment[spec.key].strip()}"}


def _reply(client: "httpx.Client", spec: EndpointSpec, label: str, question: str) -> str:
    """What the judge says to one question, sent again while the server is busy or away."""
    import httpx
    from tenacity import Retrying, retry_if_exception, stop_after_attempt

    body = {"model": spec.model, "messages": [{"role": "user", "content": question}], **spec.parameters}
    again = Retrying(
        retry=retry_if_exception(_is_passing), wait=_wait, stop=stop_after_attempt(spec.retries + 1), reraise=True
    )
    try:
        response = again(_sent, client, f"{spec.url}/chat/completions", body)
    except httpx.HTTPStatusError as error:
        raise _refused(spec, label, error) from error
    except httpx.HTTPError as error:
        raise TryAgain(
            f"metric {label}: {spec.url} does not answer ({_line(error) or type(error).__name__}); what it said so far "
            "is kept: run again when it does"
        ) from error
    return _content(response, spec, label)


def _sent(client: "httpx.Client", url: str, body: dict[str, Any]) -> "httpx.Response":
    response = client.post(url, json=body)
    response.raise_for_status()
    return response


def _is_passing(error: BaseException) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _AGAIN
    return isinstance(error, httpx.TransportError)


def _wait(state: "RetryCallState") -> float:
    """As long as the server asks for, or else a second, two, four, up to a minute, spread at random."""
    import httpx
    from tenacity import wait_exponential_jitter

    error = None if state.outcome is None else state.outcome.exception()
    if isinstance(error, httpx.HTTPStatusError):
        asked = error.response.headers.get("retry-after", "")
        if asked.isdecimal():
            return min(float(asked), _LONGEST_WAIT)
    return float(wait_exponential_jitter(initial=1, max=_LONGEST_WAIT)(state))


def _refused(spec: EndpointSpec, label: str, error: "httpx.HTTPStatusError") -> Exception:
    status, said = error.response.status_code, _line(error.response.text)
    if status in _AGAIN:
        return TryAgain(
            f"metric {label}: {spec.url} had no room {spec.retries + 1} times (HTTP {status}: {said}); what it said so "
            "far is kept: run again later, or lower concurrency"
        )
    why = {
        401: f"it does not take the key in {spec.key}" if spec.key else "it wants a key: name its variable in `key`",
        403: f"it does not let the key in {spec.key} do this"
        if spec.key
        else "it wants a key: name its variable in `key`",
        404: f"it knows no model {spec.model!r}, or its address is another one (up to /v1)",
    }.get(status, "it refuses the request; see `parameters`")
    if 300 <= status < 400:
        why = f"it is elsewhere now ({printable_line(error.response.headers.get('location', ''))}); write that address"
    return InvalidInput(f"metric {label}: {spec.url}: {why} (HTTP {status}: {said})")


def _content(response: "httpx.Response", spec: EndpointSpec, label: str) -> str:
    try:
        said = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise StageFailed(
            f"metric {label}: {spec.url} answers, but not as chat completions do ({_line(response.text)}); is the "
            "address written up to /v1?"
        ) from error
    return said if isinstance(said, str) else ""


def _letter(reply: str) -> str | None:
    """The last letter that stands alone: one that thinks aloud decides at the end."""
    found = _LETTER.findall(reply)
    return found[-1] if found else None


def _line(text: object) -> str:
    return printable_line(redact(str(text), os.environ))[:_SHOWN]


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, str]:
    """The replies that were kept; torn lines are passed over."""
    known: dict[str, str] = {}
    if not file.is_file():
        return known
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            known[str(entry["key"])] = str(entry["reply"])
        except (ValueError, TypeError, KeyError):
            continue
    return known
