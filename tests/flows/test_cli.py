"""The command line without torch and Prefect: what is imported, what is refused, and in which words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

TRIVIUM = [sys.executable, "-m", "flows.cli"]
COMMIT = "0" * 40


def trivium(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TRIVIUM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tiny project with weights that can be planned but not loaded: no torch is needed to write them."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    entry = {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": entry}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    (base / "chat_template.jinja").write_text(tiny.TEMPLATE)
    tiny.write_data(tmp_path)
    (tmp_path / "spec.yaml").write_text(tiny.SPEC)
    return tmp_path


# What `plan` may import from outside the standard library. Whoever adds to it makes every command start slower.
ALLOWED = {
    "annotated_types", "attr", "attrs", "cyclopts", "docstring_parser", "flows", "jinja2", "markdown_it",
    "markupsafe", "mdurl", "pydantic", "pydantic_core", "pygments", "rich", "rich_rst", "ruamel", "_ruamel_yaml",
    "specs", "stages", "typing_extensions", "typing_inspection",
}  # fmt: skip


INTERPRETERS_OWN = ("__editable__", "_sysconfigdata", "_cython", "cython_runtime")


@pytest.mark.parametrize("command", [["--help"], ["validate", "spec.yaml"], ["plan", "spec.yaml"], ["schema"]])
def test_light_commands_import_no_more_than_they_need(project: Path, command: list[str]) -> None:
    script = (
        "import sys; before = set(sys.modules); import flows.cli; "
        f"code = flows.cli._run({command!r}); "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print('IMPORTED', *sorted(names - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=project, timeout=60
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("IMPORTED"))
    found = {name for name in line.split()[1:] if not name.startswith(INTERPRETERS_OWN)}
    assert found <= ALLOWED


def test_validate_and_plan_say_what_would_happen(project: Path) -> None:
    valid = trivium("validate", project / "spec.yaml")
    assert valid.returncode == 0
    assert valid.stderr.count("warning") == 1
    assert "metrics.qa: warning: no gate uses this metric" in " ".join(valid.stderr.split())
    assert "valid; 3 stages: knowledge (cpt, spectrum), answers (ift, lora), manner (dpo, qlora)" in valid.stdout
    planned = trivium("plan", project / "spec.yaml")
    assert planned.returncode == 0
    assert [line.split()[:3] for line in planned.stdout.splitlines() if not line.startswith(" ")] == [
        ["run", "0", "base:"],
        ["run", "1", "knowledge"],
        ["run", "2", "answers"],
        ["run", "3", "manner"],
        ["run", "4", "release:"],
        ["measured", "of", "the"],
        ["to", "measure", "now:"],
        ["disk:", "at", "least"],
    ]
    assert planned.stdout.count("never run") == 5
    assert [path.name for path in (project / "artifacts").iterdir()] == [".counts.json"]


REFUSALS = {
    "an unknown key": (
        (
            "rank: 4}\n    data: [{path: data/instructions.jsonl}]",
            "rnak: 4}\n    data: [{path: data/instructions.jsonl}]",
        ),
        "spec.yaml:18:26: stages[1].method.rnak: unknown key; did you mean 'rank'?",
    ),
    "a wrong type": (
        ("max_steps: 10", "max_steps: ten"),
        "stages[2].train.max_steps: expected a whole number",
    ),
    "a missing file": (("data/pairs.jsonl", "data/piars.jsonl"), "data/piars.jsonl: no such file"),
    "a stage name twice": (("name: manner", "name: answers"), "stage name 'answers' is used twice"),
    "an unknown method": (("kind: qlora", "kind: qlroa"), "did you mean 'qlora'?"),
    "a base that is no model": (("path: base,", "path: data,"), "not a model: a checkpoint has config.json"),
    "an unknown trainer argument": (
        ("max_steps: 10,", "max_steps: 10, extra: {pading_free: true},"),
        "the trainer (DPOConfig) has no argument 'pading_free'; nearest: padding_free",
    ),
    "a missing task": (("tasks/qa.yaml", "tasks/qq.yaml"), "tasks/qq.yaml: no such file"),
}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_spec_is_one_clear_error_and_nothing_starts(project: Path, case: str, command: str) -> None:
    (old, new), message = REFUSALS[case]
    assert old in tiny.SPEC
    (project / "spec.yaml").write_text(tiny.SPEC.replace(old, new))
    refused = trivium(command, project / "spec.yaml")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (project / "artifacts").exists()


def test_all_errors_come_at_once_and_in_order(project: Path) -> None:
    text = tiny.SPEC.replace("kind: qlora", "kind: qlroa").replace("max_steps: 12", "max_steps: -1")
    (project / "spec.yaml").write_text(text.replace("seed: 3", "sed: 3"))
    refused = trivium("validate", project / "spec.yaml")
    lines = [int(line.split("spec.yaml:")[1].split(":")[0]) for line in refused.stderr.splitlines()]
    assert len(lines) == 4
    assert lines == sorted(lines)


def test_a_bad_row_names_its_file_and_line(project: Path) -> None:
    with (project / "data/pairs.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    refused = trivium("validate", project / "spec.yaml")
    assert refused.returncode == 2
    assert "data/pairs.jsonl:61: no column 'rejected'; columns: prompt, chosen" in refused.stderr
    assert "spec.yaml:25:12: stages[2].data[0]: " in refused.stderr


def test_an_empty_set_is_refused(project: Path) -> None:
    (project / "data/corpus.jsonl").write_text("\n")
    refused = trivium("run", project / "spec.yaml")
    assert refused.returncode == 2
    assert "data/corpus.jsonl: no rows" in refused.stderr


def test_a_method_that_needs_a_gpu_is_refused_where_there_is_none(project: Path) -> None:
    text = tiny.SPEC.replace("max_steps: 10,", "max_steps: 10, optimizer: paged_adamw_8bit,")
    (project / "spec.yaml").write_text(text)
    assert trivium("plan", project / "spec.yaml").returncode == 0  # to be run elsewhere, perhaps
    refused = trivium("run", project / "spec.yaml", "--no-prefect")
    if any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd")):
        return
    assert refused.returncode == 2
    assert "paged_adamw_8bit pages GPU memory, and there is no GPU here; use adamw_8bit or adamw" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], 'Unknown command "frobnicate"'),
        (["plan"], "requires an argument"),
        (
            ["run", "spec.yaml", "--from", "nowhere"],
            "--from nowhere: no such stage; stages: knowledge, answers, manner",
        ),
        (["plan", "missing.yaml"], "missing.yaml:1:1: "),
        (["init", "x", "--template", "nope"], "no template 'nope'; templates: quickstart, 70b-4bit, 8b-24gb"),
        (["chat", "nowhere"], "neither a model nor a project"),
        (["chat", "."], "no model is released yet"),
    ],
)
def test_wrong_usage_ends_with_2(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(project)
    refused = trivium(*arguments)
    assert refused.returncode == 2
    assert message in " ".join((refused.stdout + refused.stderr).split())
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("below", ["", "artifacts", "more/artifacts"])
@pytest.mark.parametrize("command", [["run", "--no-prefect"], ["plan"]])
def test_a_root_that_is_a_file_is_refused_by_name(project: Path, command: list[str], below: str) -> None:
    spec = project / "spec.yaml"
    refused = trivium(*command, spec, "--root", spec / below)
    assert refused.returncode == 2
    assert refused.stderr == f"trivium: {spec}: a file, and the artifacts need a folder; name another place as --root\n"


def test_artifacts_that_are_a_file_beside_the_spec_are_refused_by_name(project: Path) -> None:
    (project / "artifacts").touch()
    refused = trivium("show", project / "spec.yaml")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"trivium: {project / 'artifacts'}: a file, and the artifacts need a folder; name another place as --root, or "
        "move the file\n"
    )


@pytest.mark.parametrize(
    ("edit", "is_offline"),
    [
        (("", ""), True),
        (("{path: base,", f"{{hub: a/b, revision: '{COMMIT}',"), False),
        (("task: tasks/qa.yaml", "task: arc_easy"), False),
        (("{path: data/corpus.jsonl}", f"{{hub: a/b, revision: '{COMMIT}', files: '*.jsonl'}}"), False),
        (("{path: data/heldout.jsonl}", f"{{hub: a/b, revision: '{COMMIT}', files: '*.jsonl'}}"), False),
    ],
    ids=["files", "model", "task", "data", "metric"],
)
def test_a_stages_process_is_offline_unless_the_spec_names_the_hub(
    project: Path, edit: tuple[str, str], is_offline: bool
) -> None:
    from stages.pipeline import load_pipeline

    assert edit[0] in tiny.SPEC
    (project / "spec.yaml").write_text(tiny.SPEC.replace(*edit, 1) if edit[0] else tiny.SPEC)
    assert load_pipeline(project / "spec.yaml")[0].is_offline is is_offline


@pytest.mark.parametrize(
    ("columns", "is_terminal", "wanted"),
    [
        *((text, False, 120) for text in (None, "", "0", "wide")),
        *[("200", False, 200), (None, True, None), ("80", True, 80)],
    ],
)
def test_columns_of_what_is_printed(columns: str | None, is_terminal: bool, wanted: int | None) -> None:
    from flows.terminal import width

    assert width({} if columns is None else {"COLUMNS": columns}, is_terminal=is_terminal) == wanted


def test_init_leaves_an_edited_spec_and_other_folders_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert trivium("init", folder, "--template", "8b-24gb").returncode == 0
    (folder / "spec.yaml").write_text("mine")
    assert trivium("init", folder, "--template", "8b-24gb").returncode == 0
    assert (folder / "spec.yaml").read_text() == "mine"
    other = trivium("init", folder, "--template", "70b-4bit")
    assert (other.returncode, "exists and is not empty" in other.stderr) == (2, True)


def test_the_published_schema_is_fresh() -> None:
    import specs

    kept = Path(specs.__file__).with_name("pipeline.schema.json").read_text()
    assert trivium("schema").stdout == kept


def test_shipped_specs_are_valid_and_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name a hub model and data that users bring: given rows, they load, check and plan."""
    for name in ("8b-24gb", "70b-4bit"):
        folder = tmp_path / name
        assert trivium("init", folder, "--template", name).returncode == 0
        tiny.write_rows(folder / "data/corpus.jsonl", [{"text": "a"}])
        tiny.write_rows(folder / "data/replay.jsonl", [{"text": "a"}])
        tiny.write_rows(folder / "data/heldout.jsonl", [{"text": "a"}])
        chat = [{"prompt": "a", "completion": "b"}]
        tiny.write_rows(folder / "data/instructions.jsonl", chat)
        tiny.write_rows(folder / "data/instructions.heldout.jsonl", chat)
        tiny.write_rows(folder / "data/prompts.jsonl", [{"prompt": "a"}])
        pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        tiny.write_rows(folder / "data/preferences.jsonl", pairs)
        tiny.write_rows(folder / "data/preferences.heldout.jsonl", pairs)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        planned = trivium("plan", folder / "spec.yaml")
        assert planned.returncode == 0, planned.stderr
        assert planned.stdout.count("never run") == 5
        told = " ".join(planned.stderr.split())
        assert "metrics.general.task: warning: task arc_" in told
        assert "needs the network when it is first measured: allenai/ai2_arc" in told
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused = trivium("plan", folder / "spec.yaml")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "needs the network for allenai/ai2_arc" in refused.stderr
