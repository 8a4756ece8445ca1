"""`trivium publish --to hub:...` through the real client, against a real HTTP server that stands in for the hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import TOKEN, Hub, Repository, serving
from unread import Project, released_project

from flows.publish.publication import MANIFEST, VERDICTS
from stages.artifact import CARD


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A released project. Its gates are edited, and put back."""
    return released_project(tmp_path_factory.mktemp("hub") / "project")


def publish(project: Project, hub: Hub, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "flows.cli", "publish", str(project.folder / "spec.yaml")]
    return subprocess.run(
        [*command, "--root", str(project.root), "--to", "hub:team/tiny", *options],
        capture_output=True, text=True, check=False, timeout=120, env=environment | settings,
    )  # fmt: skip


def test_a_release_goes_in_one_commit_with_a_tag_and_is_replaced_by_the_next(released, hub):
    done = publish(released, hub, "--private")
    assert (done.returncode, done.stderr) == (0, "")
    repository = hub.repositories["team/tiny"]
    identity = released.plan().steps[-1].key
    assert done.stdout == f"published: {hub.url}/team/tiny/commit/{repository.head}, tag release-{identity[:8]}\n"
    assert repository.private
    assert set(repository.files) == {".gitattributes", "model.safetensors", CARD, VERDICTS, MANIFEST}
    kept = released.plan().steps[-1].place / "model/model.safetensors"
    assert repository.files["model.safetensors"] == kept.read_bytes()
    assert repository.commits == [f"tiny: release-{identity[:8]}"]
    assert repository.tags == {f"release-{identity[:8]}": repository.head}
    assert TOKEN not in str(repository.files)

    repository.files["tiny.gguf"] = b"by a colleague"
    released.edit(("at_most: 2", "at_most: 3"))
    try:
        again = publish(released, hub)
        assert (again.returncode, again.stderr) == (0, "")
        assert b"domain at most 3" in repository.files[CARD]
        assert repository.files["tiny.gguf"] == b"by a colleague"
        assert len(repository.commits) == 2
        assert len(repository.tags) == 1
    finally:
        released.edit(("at_most: 3", "at_most: 2"))


OTHERS = {
    "something else": {"config.json": b"{}"},
    "a list that was edited": {MANIFEST: b'{"sha256": "0", "body": {}}'},
}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_what_is_no_publication_of_this_pipeline_is_not_written_to(released, hub, files):
    hub.repositories["team/tiny"] = Repository(private=True, files=dict(files))
    refused = publish(released, hub)
    assert refused.returncode == 2
    assert refused.stderr == "trivium: hub:team/tiny: holds something else already; name another repository\n"
    assert hub.repositories["team/tiny"].files == files


def test_a_public_repository_is_not_used_where_a_private_one_was_asked_for(released, hub):
    hub.repositories["team/tiny"] = Repository(private=False)
    refused = publish(released, hub, "--private")
    assert refused.returncode == 2
    assert "hub:team/tiny: is public, and --private was asked for" in refused.stderr
    assert hub.repositories["team/tiny"].files == {}


@pytest.mark.parametrize(
    ("settings", "status", "code", "said"),
    [
        ({"HF_TOKEN": "hf_" + "wrongWRONG00" * 3}, None, 2, "the hub refuses (401)"),
        ({}, 403, 2, "the hub refuses (403)"),
        ({}, 503, 75, "the hub answers with 503"),
        ({}, 400, 4, "the hub refuses (400)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, 75, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, None, 2, "the environment forbids the network (HF_HUB_OFFLINE)"),
        ({"HF_TOKEN": ""}, None, 2, "nobody is logged in to the hub"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words_with_an_exit_code_and_no_token(
    released, hub, settings, status, code, said
):
    hub.status = status
    refused = publish(released, hub, **settings)
    assert (refused.returncode, said in refused.stderr) == (code, True), refused.stderr
    assert "Traceback" not in refused.stderr
    assert settings.get("HF_TOKEN") or TOKEN not in refused.stdout + refused.stderr
    assert not any(one.commits for one in hub.repositories.values())


def test_a_gate_that_refuses_sends_nothing(released, hub):
    released.edit(("at_most: 2", "at_most: 1"))
    try:
        refused = publish(released, hub)
    finally:
        released.edit(("at_most: 1", "at_most: 2"))
    assert refused.returncode == 3
    assert hub.requests == []


def test_a_licence_that_the_hub_does_not_know_is_refused_by_its_own_check(released, hub):
    released.edit(("model: {path: base,", "model: {license: klingon, path: base,"))
    try:
        refused = publish(released, hub)
    finally:
        released.edit(("model: {license: klingon, path: base,", "model: {path: base,"))
    assert refused.returncode == 4
    assert "the hub does not take the card" in refused.stderr
    assert hub.repositories["team/tiny"].commits == []


def test_a_dry_run_sends_nothing(released: Project, hub: Hub, tmp_path: Path) -> None:
    done = publish(released, hub, "--dry-run")
    assert done.returncode == 0
    assert "would go to hub:team/tiny as release-" in done.stdout
    assert hub.requests == []
