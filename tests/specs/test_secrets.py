import json
from urllib.parse import quote

import pytest

from specs.secrets import TOKEN_SHAPES, looks_like_secret, redact

# Put together here, so that no scanner of this repository takes them for real ones.
BODY = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8Qr9St0Uv1Wx2"
SECRETS = {
    "hf_" + BODY: "a Hugging Face token",
    "api_org_" + BODY: "a Hugging Face token",
    "sk-" + BODY: "an API key (sk-...)",
    "sk-proj-a-b_" + BODY: "an API key (sk-...)",
    "sk-ant-api03-" + BODY: "an API key (sk-...)",
    "AKIA" + "ABCDEFGH12345678": "an AWS access key",
    "ghp_" + BODY: "a GitHub token",
    "github_pat_" + BODY: "a GitHub token",
    "glpat-" + BODY: "a GitLab token",
    "AIza" + BODY[:35]: "a Google API key",
    "xoxb-" + BODY: "a Slack token",
    "pnu_" + BODY: "a Prefect API key",
    f"eyJ{BODY}.eyJ{BODY}.{BODY}": "a signed token (JWT)",
    "Bearer " + BODY: "an authorization header",
    f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n-----END RSA PRIVATE KEY-----": "a private key",
    "postgresql://trivium:p@ssw0rd@db": "a URL with a password",
    "https://:hunter2@proxy": "a URL with a password",
}
HARMLESS = [
    "0123456789abcdef" * 4,
    "0123456789abcdef0123456789abcdef01234567",
    "hf_corpus",
    "data/hf_cleaned_by_hand_and_deduplicated.jsonl",
    "sk-learn-documentation-of-every-release",
    "data/sk-wikipedia-2024-filtered-and-cleaned-v2.jsonl",
    "someone/sk-llama-3-8b-instruct-awq",
    "task-12345678901234567890",
    "disk-0123456789012345678901234567",
    "meta-llama/Llama-3.1-8B-Instruct",
    "AKIAS",
    "https://huggingface.co/datasets/org/name:tag",
    "http://localhost:4200/api",
    "s3://bucket/key@2x/a:b@c",
    "/home/me/models/base@v2:1",
    "model.layers.0.self_attn.q_proj",
    "the bearer of this letter",
    "",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_known_by_its_shape(text: str) -> None:
    assert looks_like_secret(text) == SECRETS[text]
    assert looks_like_secret(f"see {text}, above") == SECRETS[text]


def test_every_shape_has_an_example() -> None:
    assert set(SECRETS.values()) == set(TOKEN_SHAPES)


@pytest.mark.parametrize("text", HARMLESS)
def test_hashes_paths_and_names_are_no_secrets(text: str) -> None:
    assert looks_like_secret(text) is None
    assert redact(text, {}) == text


@pytest.mark.parametrize("text", SECRETS)
def test_nothing_of_a_secret_stays_in_a_redacted_line(text: str) -> None:
    line = redact(f"login with '{text}' failed", {})
    assert line.startswith("login with '[redacted]")
    assert BODY not in line
    assert "hunter2" not in line
    assert "ssw0rd" not in line


def test_the_secrets_of_the_environment_are_redacted_in_each_spelling() -> None:
    secret = 'plain "but" secret/ä'
    for name in ("HF_TOKEN", "my_api_key", "AWS_SECRET", "DB_PASSWORD", "PREFECT_API_AUTH_STRING"):
        for text in (secret, json.dumps(secret), quote(secret, safe="")):
            assert redact(f"<{text}>", {name: f"{secret}\n"}).strip('<>"') == "[redacted]"


def test_a_secret_of_several_lines_is_redacted_in_each_of_them() -> None:
    environment = {"SSH_KEY": "first line of it\nsecond line of it\n"}
    assert redact("1: first line of it", environment) == "1: [redacted]"
    assert redact("2: second line of it", environment) == "2: [redacted]"


def test_short_values_and_other_variables_are_left_alone() -> None:
    assert redact("train and more", {"A_TOKEN": "train", "HOME": "and more"}) == "train and more"


def test_a_secret_within_a_longer_one_leaves_no_rest() -> None:
    environment = {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-the-rest"}
    assert redact("x abcdefgh-and-the-rest y abcdefgh", environment) == "x [redacted] y [redacted]"
