"""Our own source: nothing in it could run what comes from outside, or open a port to it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("specs", "stages", "flows") for path in (ROOT / package).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}

# What is called, and what its arguments must be; `trust` is what `stages.remote_code.trusted` said.
RULES = {
    "torch.load": lambda given: given.get("weights_only") == "True",
    "np.load": lambda given: given.get("allow_pickle", "False") == "False",
    "numpy.load": lambda given: given.get("allow_pickle", "False") == "False",
    "load_dataset": lambda given: given.get(0) in ("'json'", "'parquet'"),
    ".from_pretrained": lambda given: given.get("trust_remote_code", "False") in ("False", "trust"),
    ".from_config": lambda given: given.get("trust_remote_code") in ("False", "trust"),
    **{
        f"Auto{kind}.from_pretrained": lambda given: given.get("trust_remote_code") in ("False", "trust")
        for kind in ("Config", "Model", "ModelForCausalLM", "Tokenizer", "Processor")
    },
}


def problems(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every place of a module that could run what it is given, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given: dict[Any, str] = {one.arg: ast.unparse(one.value) for one in node.keywords}
            given |= {number: ast.unparse(one) for number, one in enumerate(node.args)}
            if called in RUNNERS or given.get("shell", "False") != "False":
                yield node.lineno, f"runs {called}"
            for end, holds in RULES.items():
                if called.endswith(end) and not holds(given):
                    yield node.lineno, f"{called}({given})"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_nothing_in_a_source_file_runs_what_it_reads(path):
    assert list(problems(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "import dill as d",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "AutoModelForCausalLM.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=settings)",
        "load_dataset(name)",
        "AutoModelForCausalLM.from_config(config)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert list(problems(ast.parse(line)))


def test_trust_is_given_by_one_function_only():
    """What is passed as `trust` comes from `stages.remote_code.trusted`, in every function that passes it."""
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and "trust_remote_code=trust," in ast.unparse(function) + ",":
                assigned = [
                    ast.unparse(node.value)
                    for node in ast.walk(function)
                    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "trust"
                ]
                assert assigned, function.name
                assert all(value.startswith("trusted(") for value in assigned), (path, function.name)


def test_each_promise_in_the_docs_names_tests_that_are_there():
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`tests/" in line]
    named = [name for line in rows for name in re.findall(r"`(tests/[^`]+)`", line)]
    assert len(rows) >= 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_rules_of_bandit_are_on_for_all_that_ships():
    import tomllib

    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert not [rule for rule in lint["ignore"] if rule.startswith("S") and rule[1:].isdigit()]
    assert not [glob for glob in lint["per-file-ignores"] if glob.startswith(("specs", "stages", "flows"))]
