"""A judge behind HTTP: chat completions as OpenAI's interface has them, asked several at a time, each reply kept."""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.metric import EndpointSpec, is_on_this_machine
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
_LARGEST = 8 << 20
"""Bytes of a reply, unpacked: more is no chat completion, and would fill the memory."""
_READ = ("retry-after", "location", "content-type")
"""What is looked at of a reply's headers."""


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
        known = _read(file)
        keys = [_digest(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        cache.mkdir(parents=True, exist_ok=True)
        ended, writing = threading.Event(), threading.Lock()
        with (
            _client(spec, label, headers) as client,
            file.open("a", encoding="utf-8") as kept,
            ThreadPoolExecutor(spec.concurrency) as pool,
        ):

            def one(key: str, question: str) -> None:
                reply = _reply(client, spec, label, question, ended)
                with writing:  # here, so that what is under way when another one fails is kept too
                    # A line begins by itself: the one before it may have been torn.
                    kept.write("\n" + json.dumps({"key": key, "reply": reply}) + "\n")
                    kept.flush()
                known[key] = reply

            waiting = [pool.submit(one, key, question) for key, question in missing.items()]
            try:
                for number, future in enumerate(as_completed(waiting), start=len(keys) - len(missing) + 1):
                    future.result()
                    event("measuring", metric=label, done=number, total=len(keys))
            finally:
                ended.set()  # nobody goes on waiting for a server that is busy
                pool.shutdown(wait=False, cancel_futures=True)
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
    if spec.key is None:
        return {}
    key = environment[spec.key].strip()
    if not re.fullmatch(r"[!-~]+", key):  # the client would name it in its complaint
        raise InvalidInput(
            f"metric {label}: what the environment has as {spec.key} is no key: it is empty, or holds white space, a "
            "line break or letters beyond ASCII"
        )
    return {"Authorization": f"Bearer {key}"}


def _client(spec: EndpointSpec, label: str, headers: Mapping[str, str]) -> "httpx.Client":
    """A client that goes through the environment's proxy, except to this machine: a key would leave it in clear."""
    import httpx

    beyond = not (spec.url.startswith("http:") and is_on_this_machine(spec.url))
    try:
        return httpx.Client(headers=headers, timeout=spec.timeout, follow_redirects=False, trust_env=beyond)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise InvalidInput(
            f"metric {label}: the environment names a proxy or certificates that cannot be used ({_line(error)}); see "
            "HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE"
        ) from error


def _reply(client: "httpx.Client", spec: EndpointSpec, label: str, question: str, ended: threading.Event) -> str:
    """What the judge says to one question, sent again while the server is busy or away and nothing has ended."""
    import httpx
    from tenacity import Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, stop_when_event_set

    body = {"model": spec.model, "messages": [{"role": "user", "content": question}], **spec.parameters}
    again = Retrying(
        retry=retry_if_exception(_is_passing),
        wait=_wait,
        stop=stop_after_attempt(spec.retries + 1) | stop_when_event_set(ended),
        sleep=sleep_using_event(ended),
        reraise=True,
    )
    try:
        response = again(_sent, client, spec, label, body)
    except httpx.HTTPStatusError as error:
        raise _refused(spec, label, error, client) from error
    except httpx.HTTPError as error:
        raise TryAgain(
            f"metric {label}: {spec.url} does not answer ({_line(error) or type(error).__name__}); what it said so far "
            "is kept: run again when it does"
        ) from error
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InvalidInput(f"metric {label}: {printable_line(spec.url)} is no address: {_line(error)}") from error
    return _content(response, spec, label)


def _sent(client: "httpx.Client", spec: EndpointSpec, label: str, body: dict[str, Any]) -> "httpx.Response":
    """The whole response, of bounded size, within the spec's seconds: the client's own count from byte to byte."""
    import httpx

    end = time.monotonic() + spec.timeout
    content = bytearray()
    # Written in ASCII: half a surrogate pair, which a row's JSON may hold, has no other spelling.
    sent, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with client.stream("POST", f"{spec.url}/chat/completions", content=sent, headers=kind) as response:
        for part in response.iter_bytes():
            content += part
            if len(content) > _LARGEST:
                raise StageFailed(
                    f"metric {label}: {spec.url} answers with more than {_LARGEST >> 20} MB to one question"
                )
            if time.monotonic() > end:
                raise httpx.ReadTimeout(f"no whole answer within {spec.timeout:g} s", request=response.request)
        headers = {name: response.headers[name] for name in _READ if name in response.headers}
        whole = httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)
    whole.raise_for_status()
    return whole


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


def _refused(spec: EndpointSpec, label: str, error: "httpx.HTTPStatusError", client: "httpx.Client") -> Exception:
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")
    status, said = error.response.status_code, _line(error.response.text, key)
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
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise StageFailed(
            f"metric {label}: {spec.url} answers, but not as chat completions do ({_line(response.text)}); is the "
            "address written up to /v1?"
        ) from error
    return said if isinstance(said, str) else ""


def _letter(reply: str) -> str | None:
    """The last letter that stands alone: one that thinks aloud decides at the end."""
    found = _LETTER.findall(reply)
    return found[-1] if found else None


def _line(text: object, key: str = "") -> str:
    """A server's words in one line, without secrets; its key may be in a variable whose name does not say so."""
    return printable_line(redact(str(text), {**os.environ, "THE_KEY": key}))[:_SHOWN]


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
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return known
