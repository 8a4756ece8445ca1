"""Chat templates: no code, bounded in time and size, and blind to the clock unless the spec gives the day."""

import datetime as clock
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import tiny

from specs.load import SpecError
from stages import bounds, template
from stages.check import check_spec
from stages.errors import InvalidInput
from stages.faults import explain
from stages.pipeline import load_pipeline
from stages.template import check_template, dated, folder_templates

ASKS = "{{ strftime_now('%d %b %Y') }}\n" + tiny.TEMPLATE
DAY = date(2025, 2, 3)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


# Without loading anything


def test_a_template_that_does_not_parse_is_refused_with_its_line(tmp_path):
    with pytest.raises(InvalidInput, match=r"a\.jinja:2: not a Jinja template: .*model\.chat_template"):
        check_template(tmp_path / "a.jinja", "{{ messages }}\n{% for x in %}", None)


def test_a_template_that_asks_for_the_date_is_refused_unless_the_spec_gives_one(tmp_path):
    with pytest.raises(InvalidInput, match=r"a\.jinja:1: .*today's date.*model\.template_date: 2026-01-31"):
        check_template(tmp_path / "a.jinja", ASKS, None)
    check_template(tmp_path / "a.jinja", ASKS, DAY)


def test_a_template_that_only_mentions_the_date_is_taken(tmp_path):
    check_template(tmp_path / "a.jinja", "{# strftime_now #}{% set strftime_now = 1 %}{{ 'strftime_now' }}", None)


def test_blocks_that_transformers_adds_to_jinja_are_known(tmp_path):
    check_template(
        tmp_path / "a.jinja", "{% generation %}{% break %}{% endgeneration %}".replace("{% break %}", ""), None
    )
    check_template(tmp_path / "a.jinja", "{% for m in messages %}{% break %}{% endfor %}", None)


def test_a_template_nested_without_end_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"a\.jinja.*(nested too deep|not a Jinja template)"):
        check_template(tmp_path / "a.jinja", "{{ " + "(" * 5000 + ")" * 5000 + " }}", None)


def test_templates_are_found_beside_the_tokenizer_and_inside_its_settings(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("one")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "two"}]}')
    assert [text for _, text in folder_templates(tmp_path)] == ["one", "two"]


def test_a_template_of_many_megabytes_is_not_read(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x" * (template.LONGEST + 1))
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja: longer than 1,048,576 characters"):
        folder_templates(tmp_path)


def test_looking_at_a_template_needs_no_torch():
    code = (
        "import sys; from pathlib import Path; from stages.template import check_template;"
        "check_template(Path('a'), '{{ messages }}', None);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rendering

HOSTILE = {
    "a loop in a loop in a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "three billion letters": "{{ 'x' * 3_000_000_000 }}",
    "letters that double": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "a number of many digits": "{{ 10 ** (10 ** 10) }}",
    "padding by a format": "{{ '{:>20000000000}'.format(1) }}",
    "padding by a method": "{{ 'x'.ljust(10 ** 11) }}",
    "padding by a filter": "{{ 'x' | center(10 ** 11) }}",
    "indented JSON": "{{ messages | tojson(indent=10 ** 11) }}",
    "words without end": "{{ lipsum(n=10 ** 9) }}",
    "more than a model can read": "{% for a in range(99999) %}{{ 'y' * 999 }}{% endfor %}",
}


@pytest.fixture
def tokenizer(base_model, monkeypatch):
    from stages.model import load_tokenizer

    monkeypatch.setattr(bounds, "SECONDS", 0.5)
    return load_tokenizer(base_model)


@pytest.mark.model
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_a_clear_refusal_and_the_process_goes_on(text, tokenizer):
    from stages.conversation import render

    limits = resource.getrlimit(resource.RLIMIT_AS)
    usual = render(tokenizer, CHAT)
    good, tokenizer.chat_template = tokenizer.chat_template, text
    with pytest.raises(
        InvalidInput, match=r"the chat template .*another one in the spec \(model\.chat_template\)"
    ) as told:
        render(tokenizer, CHAT)
    assert tokenizer.name_or_path in str(told.value)
    assert explain(told.value) is told.value  # what the template asked for is not what the machine lacks
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    tokenizer.chat_template = good
    assert render(tokenizer, CHAT) == usual
    assert len(bytearray(bounds.MEMORY)) == bounds.MEMORY  # and it has its memory back


@pytest.mark.model
@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ strftime_now.__globals__.keys() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.clear() }}",
    ],
)
def test_a_template_cannot_get_out_of_its_sandbox(text, tokenizer, tmp_path):
    from stages.conversation import render

    tokenizer.chat_template = text.replace("MARK", str(tmp_path / "mark"))
    with pytest.raises(InvalidInput, match="the chat template fails"):
        render(tokenizer, CHAT)
    assert not (tmp_path / "mark").exists()


@pytest.mark.model
def test_every_rendering_of_the_process_is_bounded_the_libraries_own_too(tokenizer):
    tokenizer.chat_template = HOSTILE["three billion letters"]
    with pytest.raises(InvalidInput, match="takes more than 512 MiB"):
        tokenizer.apply_chat_template(CHAT, tokenize=True)


# The date


class _OtherDay(clock.datetime):
    """Today, ten years off."""

    shift = 0

    @classmethod
    def now(cls, tz=None):
        return super().now(tz).replace(year=clock.datetime.today().year + cls.shift, day=1)


@pytest.fixture(params=[-10, 10])
def other_day(request, monkeypatch):
    """The clock as transformers and we read it."""
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(_OtherDay, "shift", request.param)
    for module in (chat_template_utils, template):
        monkeypatch.setattr(module, "datetime", _OtherDay)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + request.param * 365 * 86400)


@pytest.mark.model
def test_the_spec_gives_the_date_whatever_the_clock_says(tokenizer, other_day):
    from stages.conversation import encode_conversation, render

    tokenizer.chat_template = ASKS
    assert render(tokenizer, CHAT).startswith(_OtherDay.now().strftime("%d %b %Y"))
    with dated(DAY):
        assert render(tokenizer, CHAT).startswith("03 Feb 2025")
        encode_conversation(tokenizer, CHAT)
        ids = tokenizer.apply_chat_template(CHAT)["input_ids"]
        assert tokenizer.decode(ids).startswith("03 Feb 2025")
    with dated(None), pytest.raises(InvalidInput, match=r"today's date .*model\.template_date"):
        render(tokenizer, CHAT)


@pytest.mark.model
def test_training_and_evaluation_see_one_date_on_every_day(base_model, tmp_path, monkeypatch):
    """Rows of IFT, pairs as TRL tokenises them, and a task of the harness: ten years apart, the same ids."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from stages.arguments import trainer_arguments
    from stages.model import load_plain, load_tokenizer
    from stages.rows import conversation_row, preference_row

    tiny.write_data(tmp_path)
    (tmp_path / "spec.yaml").write_text(tiny.SPEC)
    _, ift, dpo = load_pipeline(tmp_path / "spec.yaml")[0].stages
    dpo = dpo.model_copy(update={"method": ift.method})
    tokenizer = load_tokenizer(base_model)
    tokenizer.chat_template = ASKS
    model = load_plain(base_model, torch.float32)

    def seen() -> list:
        rows, _ = ift.dataset([conversation_row({"prompt": "say", "completion": "yes"})], tokenizer)
        pairs, _ = dpo.dataset([preference_row({"prompt": "say", "chosen": "yes", "rejected": "no"})], tokenizer)
        arguments = trainer_arguments(dpo, seed=0, folder=tmp_path, bfloat16=False, cpu=True)
        trained = dpo.trainer(model, tokenizer, pairs, arguments, []).train_dataset
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        return [rows[:], trained[:], harness.apply_chat_template(CHAT[:1])]

    found = []
    for shift in (-10, 0, 10):
        with monkeypatch.context() as patch, dated(DAY):
            patch.setattr(_OtherDay, "shift", shift)
            patch.setattr(template, "datetime", _OtherDay)
            found.append(seen())
    assert "03 Feb 2025" in found[0][2]
    assert all("03 Feb 2025" in tokenizer.decode(ids) for ids in found[0][1]["prompt_ids"])
    assert found[0] == found[1] == found[2]


@pytest.mark.model
def test_the_released_template_stays_as_it_was_and_the_date_is_part_of_the_identity(tmp_path, run_spec):
    from stages.plan import make_plan

    spec = tiny.write_project(tmp_path / "p", tiny.SPEC[: tiny.SPEC.index("  - name: answers")])
    (tmp_path / "p/base/chat_template.jinja").write_text(ASKS)
    text = spec.read_text()
    spec.write_text(text.replace("dtype: float32", "dtype: float32, template_date: 2025-02-03"))
    plan = run_spec(spec)
    assert (plan.steps[-1].artifact.model / "chat_template.jinja").read_text() == ASKS
    spec.write_text(text.replace("dtype: float32", "dtype: float32, template_date: 2025-02-04"))
    later = make_plan(load_pipeline(spec)[0], spec.parent, plan.store.parent)
    assert "template_date" in later.steps[0].reason
    assert later.steps[1].key != plan.steps[1].key


@pytest.mark.model
def test_the_base_of_a_job_with_a_clock_in_its_template_is_refused(tmp_path, run_spec):
    spec = tiny.write_project(tmp_path / "p")
    (tmp_path / "p/base/chat_template.jinja").write_text(ASKS)
    with pytest.raises(InvalidInput, match=r"base/chat_template\.jinja:1: .*model\.template_date"):
        run_spec(spec)


@pytest.mark.model
def test_a_rendering_outside_the_main_thread_is_bounded_in_memory_all_the_same(tokenizer):
    import threading

    from stages.conversation import render

    tokenizer.chat_template = HOSTILE["three billion letters"]
    caught: list[BaseException] = []

    def work() -> None:
        try:
            render(tokenizer, CHAT)
        except InvalidInput as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert "takes more than 512 MiB" in str(caught[0])


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (ASKS, r"model\.chat_template: .*own\.jinja:1: the chat template asks for today's date"),
        ("{{ messages", r"model\.chat_template: .*own\.jinja:1: not a Jinja template"),
    ],
)
def test_validate_looks_at_the_template_that_a_spec_names(text, wanted, base_model, tmp_path):
    base = Path(shutil.copytree(base_model, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(ASKS)
    tiny.write_data(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(tiny.SPEC)
    with pytest.raises(SpecError, match=r"spec\.yaml:2:\d+: model\.path: .*base/chat_template\.jinja:1: .*date"):
        check_spec(*load_pipeline(spec))
    (tmp_path / "own.jinja").write_text(text)
    spec.write_text(tiny.SPEC.replace("path: base,", "path: base, chat_template: own.jinja,"))
    with pytest.raises(SpecError, match=rf"spec\.yaml:2:\d+: {wanted}"):
        check_spec(*load_pipeline(spec))


def test_a_row_that_a_template_refuses_is_shown_on_one_line_with_the_remedy(base_model, tmp_path):
    from stages.conversation import render
    from stages.model import load_tokenizer

    tokenizer = load_tokenizer(Path(shutil.copytree(base_model, tmp_path / "base")))
    tokenizer.chat_template = "{{ raise_exception('roles must\\n\x1b[2Jalternate') }}"
    with pytest.raises(
        InvalidInput, match=r"base: the chat template fails on \[.*\]: roles must \\x1b\[2Jalternate; .*model\."
    ):
        render(tokenizer, CHAT)
