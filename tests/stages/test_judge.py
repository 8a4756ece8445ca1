"""The judge: what it is asked, what its letters are worth, a model that judges here, and one behind HTTP."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from tiny import write_data, write_model, write_rows

from flows.cli import _run
from flows.summary import rankings, summarise
from specs.metric import JUDGE_PROMPT, EndpointSpec, JudgeSpec
from stages.errors import InvalidInput, StageFailed, TryAgain
from stages.metrics.endpoint import endpoint_judge
from stages.metrics.judge import compare, question
from stages.metrics.local_judge import local_judge
from stages.run import run_job

SPEC = JudgeSpec(kind="judge", answers="said", endpoint=EndpointSpec(url="http://127.0.0.1:1/v1", model="m"))


def sample(answer: str, prompt: str = "how?", tokens: int = 3) -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "answer": answer, "reference": None, "tokens": tokens, "stopped": True}


def judged(letters: list[str | None], ours: list[dict], theirs: list[dict]):
    return compare(SPEC, "taste", ours, theirs, lambda questions: letters[: len(questions)])


@pytest.mark.parametrize(
    ("letters", "points"),
    [("AB", 1.0), ("BA", 0.0), ("AA", 0.5), ("BB", 0.5), ("CC", 0.5), ("AC", 0.5), ("CB", 0.5), ("CA", 0.5)],
)
def test_a_pair_is_won_only_if_it_is_won_in_both_orders(letters, points):
    measures, _, samples = judged(list(letters), [sample("yes")], [sample("no")])
    assert samples[0]["points"] == points
    assert measures["win_rate"].value == points
    assert measures["consistency"].value == float(letters in ("AB", "BA", "CC"))


def test_both_orders_are_asked_and_equal_answers_are_not():
    asked: list[str] = []
    ours, theirs = [sample("one"), sample("same")], [sample("two"), sample("same")]

    def ask(questions):
        asked.extend(questions)
        return ["A", "B"]

    measures, shown, samples = compare(SPEC, "taste", ours, theirs, ask)
    assert [text.index("one") < text.index("two") for text in asked] == [True, False]
    assert samples[1]["letters"] == []
    assert (measures["win_rate"].value, measures["tie_rate"].value) == (0.75, 0.5)
    assert shown == {"prompts": 2, "equal": 1, "asked": 2, "unreadable": 0}


def test_what_favours_the_place_or_the_length_is_measured():
    ours = [sample("a", tokens=9), sample("b", tokens=1), sample("c", tokens=1)]
    theirs = [sample("x", tokens=2), sample("y", tokens=5), sample("z", tokens=1)]
    measures, _, _ = judged(["A", "B", "B", "A", "A", "A"], ours, theirs)
    assert measures["first_rate"].value == pytest.approx(4 / 6)
    assert measures["longer_rate"].value == 1.0
    assert measures["longer_rate"].weights == (1.0, 1.0, 0.0)


def test_answers_are_data_whatever_stands_in_them():
    text = question(JUDGE_PROMPT, sample("{answer_b} {prompt}"), sample("second"))
    assert "{answer_b} {prompt}" in text
    assert text.count("second") == 1
    several = sample("x") | {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "go"}]}
    assert "system: be kind\n\nuser: go" in question(JUDGE_PROMPT, several, several)


def test_a_judge_that_cannot_be_read_measures_nothing():
    ours, theirs = [sample(f"a{n}") for n in range(10)], [sample(f"b{n}") for n in range(10)]
    with pytest.raises(StageFailed, match="3 of 20 replies of the judge hold no letter"):
        judged([None] * 3 + ["A"] * 17, ours, theirs)
    measures, shown, _ = judged([None] * 2 + ["A", "B"] * 9, ours, theirs)
    assert shown["unreadable"] == 2
    assert measures["win_rate"].value == pytest.approx(0.95)


def test_other_prompts_are_not_compared():
    with pytest.raises(StageFailed, match="answered different prompts"):
        judged([], [sample("a", "one")], [sample("b", "two")])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "a judge is a model or an endpoint; found none"),
        ({"endpoint": {"url": "ftp://x/v1", "model": "m"}}, "no http or https address"),
        ({"endpoint": {"url": "http://far.example/v1", "model": "m", "key": "MY_KEY"}}, "in clear text"),
        ({"endpoint": {"url": "https://x/v1", "model": "m", "parameters": {"stream": True}}}, "stream cannot be set"),
        ({"endpoint": {"url": "https://x/v1", "model": "m"}, "prompt": "{prompt} {answer_a}"}, "{answer_b}"),
        (
            {"endpoint": {"url": "https://x/v1", "model": "m"}, "prompt": "{prompt}{answer_a}{answer_b}{question}"},
            "{question} is filled with nothing",
        ),
    ],
)
def test_a_judge_that_cannot_work_is_refused(fields, said):
    with pytest.raises(ValidationError, match=said.replace("{", r"\{").replace("}", r"\}")):
        JudgeSpec.model_validate({"kind": "judge", "answers": "said"} | fields)


class Server(ThreadingHTTPServer):
    """Somebody else's server of chat completions: it prefers the longer answer, and does what ``first`` says first."""

    def __init__(self, first: list[tuple[int, dict, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.first, self.asked, self.keys = first, [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.first:
            status, headers, text = self.server.first.pop(0)
        else:
            said = body["messages"][0]["content"]
            a, b = said.split("[Answer A]")[1].split("[End]")[0].split("[Answer B]")
            letter = "A" if len(a) > len(b) else "B"
            reply = {"choices": [{"message": {"content": f"A and B were read. {letter}"}}]}
            status, headers, text = 200, {}, json.dumps(reply)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serving(*first: tuple[int, dict, str]) -> Iterator[Server]:
    server = Server(list(first))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PAIRS = ((sample("long one"), sample("x")), (sample("y"), sample("long")))
QUESTIONS = [question(JUDGE_PROMPT, *pair) for pair in PAIRS]


def endpoint(server: Server, **fields) -> EndpointSpec:
    return EndpointSpec(url=server.url, model="judge-1", **fields)


def test_a_judge_behind_http_is_asked_once_for_each_question(tmp_path):
    with serving() as server:
        spec = endpoint(server, key="TASTE_KEY", parameters={"temperature": 0, "seed": 3})
        ask = endpoint_judge(spec, "taste", tmp_path, {"TASTE_KEY": "very-secret-words"})
        assert ask(QUESTIONS) == ["A", "B"]
        assert ask([*QUESTIONS, QUESTIONS[0]]) == ["A", "B", "A"]
        assert len(server.asked) == 2
        assert set(server.keys) == {"Bearer very-secret-words"}
        assert {key: server.asked[0][key] for key in ("model", "temperature", "seed")} == {
            "model": "judge-1", "temperature": 0, "seed": 3,
        }  # fmt: skip
        assert "very-secret-words" not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_what_a_crash_left_is_not_paid_for_again(tmp_path):
    with serving() as server:
        spec = endpoint(server)
        endpoint_judge(spec, "taste", tmp_path, {})(QUESTIONS[:1])
        (kept,) = tmp_path.iterdir()
        kept.write_text(kept.read_text() + '{"key": "torn')
        assert endpoint_judge(spec, "taste", tmp_path, {})(QUESTIONS) == ["A", "B"]
        assert endpoint_judge(spec, "taste", tmp_path, {})(QUESTIONS) == ["A", "B"]
        assert len(server.asked) == 2


def test_a_busy_server_is_asked_again_when_it_says(tmp_path):
    with serving((429, {"Retry-After": "0"}, ""), (503, {"Retry-After": "0"}, "")) as server:
        assert endpoint_judge(endpoint(server, concurrency=1), "taste", tmp_path, {})(QUESTIONS) == ["A", "B"]
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ((401, {}, "you, hf_abcdefghijklmnopqrstuvwx"), InvalidInput, r"does not take the key in TASTE_KEY .*you"),
        ((404, {}, "no"), InvalidInput, "knows no model 'judge-1'"),
        ((400, {}, "\x1b[2J bad"), InvalidInput, r"refuses the request.*HTTP 400: \\x1b\[2J bad"),
        ((301, {"Location": "https://x"}, ""), InvalidInput, "elsewhere now"),
        ((200, {}, "<html>"), StageFailed, "not as chat completions do"),
        ((429, {"Retry-After": "0"}, "slow down"), TryAgain, "had no room 1 times .*what it said so far is kept"),
    ],
)
def test_what_a_server_refuses_is_told_with_what_to_do(answer, error, said, tmp_path):
    with serving(answer) as server:
        spec = endpoint(server, key="TASTE_KEY", retries=0, concurrency=1)
        with pytest.raises(error, match=said) as caught:
            endpoint_judge(spec, "taste", tmp_path, {"TASTE_KEY": "k" * 20})(QUESTIONS[:1])
        assert "hf_abc" not in str(caught.value)


def test_a_server_that_is_away_is_a_reason_to_try_again(tmp_path):
    with serving() as server:
        spec = endpoint(server, retries=0)
    with pytest.raises(TryAgain, match="does not answer"):
        endpoint_judge(spec, "taste", tmp_path, {})(QUESTIONS[:1])


@pytest.mark.parametrize("key", ["sk-first\nsecond-line-of-it", "ключ-ключ-ключ", " \t "])
def test_a_key_that_no_header_can_carry_is_refused_unsaid(key, tmp_path):
    spec = EndpointSpec(url="https://judge.example/v1", model="m", key="TASTE_KEY")
    with pytest.raises(InvalidInput, match="what the environment has as TASTE_KEY is no key") as caught:
        endpoint_judge(spec, "taste", tmp_path, {"TASTE_KEY": key})
    assert not key.strip() or key.strip()[-4:] not in str(caught.value)


def test_a_proxy_never_hears_what_is_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving() as server:
        spec = endpoint(server, key="TASTE_KEY", retries=0)
        assert endpoint_judge(spec, "taste", tmp_path, {"TASTE_KEY": "k"})(QUESTIONS) == ["A", "B"]
    monkeypatch.setenv("ALL_PROXY", "socks9://user:secret-word@127.0.0.1:9")
    away = EndpointSpec(url="https://judge.example/v1", model="m")
    with pytest.raises(InvalidInput, match="names a proxy or certificates that cannot be used") as caught:
        endpoint_judge(away, "taste", tmp_path, {})(QUESTIONS)
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/v1", "http://h:x/v1", "https://me@host/v1", "https://me:pw@host/v1"]
)
def test_an_address_with_a_name_or_an_impossible_port_is_refused(url):
    with pytest.raises(ValidationError, match=r"before @|[Pp]ort"):
        EndpointSpec(url=url, model="m")


def test_a_reply_that_would_fill_the_memory_or_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.metrics.endpoint._LARGEST", 1000)
    with serving((200, {}, "x" * 5000), (200, {}, "[" * 900)) as server:
        ask = endpoint_judge(endpoint(server, retries=0, concurrency=1), "taste", tmp_path, {})
        with pytest.raises(StageFailed, match="answers with more than"):
            ask(QUESTIONS[:1])
        with pytest.raises(StageFailed, match="not as chat completions do"):
            ask(QUESTIONS[:1])
        assert ask([QUESTIONS[0] + "\ud800"]) == ["A"]
        clock = itertools.count(step=40)
        monkeypatch.setattr("stages.metrics.endpoint.time", SimpleNamespace(monotonic=lambda: next(clock)))
        slow = endpoint_judge(endpoint(server, retries=0, timeout=30), "taste", tmp_path, {})
        with pytest.raises(TryAgain, match="no whole answer within 30 s"):
            slow(QUESTIONS[:1])


def test_what_is_said_while_another_question_fails_is_kept_and_nobody_waits_on(tmp_path):
    busy = (503, {"Retry-After": "60"}, "")
    with serving(busy, (401, {}, "you are k1234567")) as server:
        spec = endpoint(server, key="WORD", concurrency=2)
        begun = time.monotonic()
        with pytest.raises((InvalidInput, TryAgain)) as caught:
            endpoint_judge(spec, "taste", tmp_path, {"WORD": "k1234567"})(QUESTIONS)
        assert time.monotonic() - begun < 30
        assert "k1234567" not in str(caught.value)


CHAIN = """\
name: tasted
model: {path: base, dtype: float32}
seed: 1
metrics:
  taste: {kind: judge, answers: said, against: previous, JUDGE}
  said: {kind: generation, data: {path: prompts.jsonl}, max_new_tokens: 6, temperature: 1.0}
stages:
  - name: one
    kind: ift
    method: {kind: full}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 3, sequence_length: 48, batch_size: 2, precision: float32}
    gates: [{metric: taste, at_least: 0.01, confidence: null}]
  - name: two
    kind: ift
    method: {kind: lora, rank: 2}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 3, sequence_length: 48, batch_size: 2, precision: float32}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    write_model(folder / "base")
    write_data(folder)
    words = ("the", "cat", "sat", "on", "a", "mat")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"say {word}"} for word in words])
    return folder


def written(project, judge: str):
    spec = project / "spec.yaml"
    spec.write_text(CHAIN.replace("JUDGE", judge))
    return spec


@pytest.mark.model
def test_a_chain_is_judged_by_a_model_that_is_loaded_here(project, run_spec):
    plan = run_spec(written(project, "model: {path: base, dtype: float32}, batch_size: 3"))
    base, one, two, _ = plan.steps
    assert base.evaluation("taste") is None
    first, second = one.evaluation("taste"), two.evaluation("taste")
    assert first.measure(None).n == second.measure("win_rate").n == 6
    for evaluation, ours, theirs in ((first, one, base), (second, two, one)):
        assert [row["answer"] for row in evaluation.samples] == [
            row["answer"] for row in ours.evaluation("said").samples
        ]
        assert [row["other"] for row in evaluation.samples] == [
            row["answer"] for row in theirs.evaluation("said").samples
        ]
    assert not plan.pending
    assert [one.model for one in rankings(plan)["taste"]] == ["base", "one", "two"]
    rows = {row[0]: row[1:] for row in summarise(plan).metrics}
    assert rows["taste · Elo"][0] == "1000"
    assert rows["taste · win_rate"][0] == "–"
    again = run_spec(written(project, "model: {path: base, dtype: float32}, batch_size: 1"))
    letters = [sample["letters"] for sample in again.steps[1].evaluation("taste").samples]
    assert letters == [sample["letters"] for sample in first.samples]  # whatever the batch


@pytest.mark.model
def test_a_judge_here_needs_room_for_the_question_and_numbers_for_scores(base_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

    spec = JudgeSpec(kind="judge", answers="said", model={"path": "judge"})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
    ask = local_judge(spec, "taste", model.eval(), tokenizer)
    with pytest.raises(InvalidInput, match=r"question 2 of 2 has .* tokens; the judge has 512 positions: take another"):
        ask(["short", "long " * 600])
    with torch.no_grad():
        model.lm_head.weight[:] = torch.inf
    with pytest.raises(StageFailed, match=r"scores are no numbers in torch\.float32"):
        ask(["short"])
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)  # takes no positions
    assert local_judge(spec, "taste", BloomForCausalLM(config).eval(), tokenizer)(["a", "b c"])


@pytest.mark.model
def test_a_chain_is_judged_over_http_and_an_edited_gate_asks_nobody(project, run_spec, monkeypatch):
    monkeypatch.setenv("TASTE_KEY", "very-secret-words")
    with serving() as server:
        judge = f"endpoint: {{url: '{server.url}', model: m, key: TASTE_KEY}}"
        plan = run_spec(written(project, judge))
        asked = len(server.asked)
        shown = [step.evaluation("taste").shown["asked"] for step in plan.steps[1:3]]
        assert max(shown) <= asked <= sum(shown)  # two stages may say the same
        assert asked > 0
        spec = written(project, judge.replace("m, key", "m, concurrency: 2, key"))
        spec.write_text(spec.read_text().replace("0.01", "0.02"))
        assert not run_spec(spec).pending
        assert len(server.asked) == asked
    assert "very-secret-words" not in "".join(
        file.read_text(errors="replace") for file in (project / "runs").rglob("*.json*")
    )


def test_a_missing_key_is_said_before_anything_runs(project, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    spec = written(project, "endpoint: {url: 'https://judge.example/v1', model: m, key: NO_SUCH_KEY}")
    assert _run(["validate", str(spec)]) == 0
    assert _run(["plan", str(spec)]) == 2
    assert "metrics.taste.endpoint.key: the environment has no NO_SUCH_KEY" in capsys.readouterr().err


def test_answers_that_nobody_gives_are_named_at_their_line(project, capsys):
    spec = written(project, "model: {path: nowhere}")
    spec.write_text(spec.read_text().replace("answers: said, against: previous", "answers: sad, against: three"))
    assert _run(["validate", str(spec)]) == 2
    said = capsys.readouterr().err
    assert "spec.yaml:5:24: metrics.taste.answers: no metric of kind generation 'sad'; did you mean 'said'?" in said
    assert "metrics.taste.against: no step 'three'" in said
    assert "no such folder" in said


def test_a_gate_on_a_comparison_with_a_later_stage_is_refused(project, capsys):
    spec = written(project, "model: {path: base}")
    spec.write_text(spec.read_text().replace("against: previous", "against: two"))
    assert _run(["validate", str(spec)]) == 2
    assert "stages[0].gates[0].metric: metric taste compares with stage two, which comes no earlier" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("against", "gate", "said"),
    [
        ("previous", ("at_least: 0.01", "improves_on: base"), "stages[0].gates[0].improves_on: metric taste is not"),
        (
            "base",
            ("at_least: 0.01", "keeps: previous"),
            "stages[0].gates[0].keeps: metric taste is not measured on base",
        ),
        ("base", ("{metric: taste, at_least: 0.01", "{metric: said.length, keeps: base"), ""),
    ],
)
def test_a_gate_that_compares_with_where_no_judge_was_asked_is_refused(project, capsys, against, gate, said):
    spec = written(project, "model: {path: base}")
    spec.write_text(spec.read_text().replace("against: previous", f"against: {against}").replace(*gate))
    assert _run(["validate", str(spec)]) == (2 if said else 0)
    assert said in capsys.readouterr().err


RELEASE = """\
release:
  gates:
    - {metric: taste, at_least: 0.01, confidence: null}
    - {metric: taste, keeps: two, within: 1, confidence: null}
"""


@pytest.mark.model
@pytest.mark.parametrize("against", ["base", "previous"])
def test_the_release_is_judged_over_all_prompts_and_so_is_the_stage_that_it_is_compared_with(
    project, run_spec, against
):
    spec = written(project, "model: {path: base, dtype: float32}, limit: 2")
    chain = spec.read_text().replace("path: prompts.jsonl}", "path: prompts.jsonl}, limit: 3")
    spec.write_text(chain.replace("against: previous", f"against: {against}") + RELEASE)
    plan = run_spec(spec, until="two")
    for number in range(len(plan.references)):
        run_job(plan.job(plan.references[number]))
        plan = run_spec(spec, until="two")
    plan = run_spec(spec)
    assert not plan.pending
    assert [one.outcome for one in plan.verdicts(plan.steps[-1])] == ["passed", "passed"]
    in_full = {step.name: step for step in (*plan.references, plan.steps[-1])}
    start = in_full["base" if against == "base" else "one"]
    assert [len(step.evaluation("said").samples) for step in in_full.values()] == [6] * len(in_full)
    for judged in (in_full["two"], in_full["release"]):
        found = judged.evaluation("taste")
        assert found.measure(None).n == 6
        assert [one["answer"] for one in found.samples] == [one["answer"] for one in judged.evaluation("said").samples]
        assert [one["other"] for one in found.samples] == [one["answer"] for one in start.evaluation("said").samples]
    assert plan.steps[2].evaluation("taste").measure(None).n == 2
    assert [one.model for one in rankings(plan)["taste"]] == ["base", "one", "two"]
    rows = {row[0]: row[1:] for row in summarise(plan).release_metrics}
    assert "–" not in rows["taste · win_rate"][-2:]


def test_a_generation_that_only_a_judge_reads_is_used(project, capsys):
    assert _run(["validate", str(written(project, "model: {path: base}"))]) == 0
    assert "metrics.said: warning" not in capsys.readouterr().err
