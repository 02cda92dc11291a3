"""The documents: every Python block runs, links lead somewhere, and every error, policy and pass is described.

A block marked ```` ```python no-run ```` is compiled only. The blocks of one document run as one program, in a fresh
interpreter, in an empty folder that holds the repository's `examples/`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import tokgraph
from tokgraph import errors
from tokgraph.cli import main as tokgraph_command
from tokgraph.passes import GraphPass
from tokgraph.planning import policies

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*) *(?P<options>.*)$")


def blocks(path: Path, language: str, option: str = "") -> str:
    """The blocks of one language and option, each line at its number in the document (so tracebacks fit)."""
    found: list[str] = []
    inside, wanted, indent = False, False, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line)
        if fence:
            inside = not inside
            wanted = inside and fence["language"] == language and fence["options"] == option
            indent = len(fence["indent"])
        found.append(line[indent:] if wanted and not fence else "")
    assert not inside, f"{path.name}: a code block is not closed"
    return "\n".join(found) + "\n"


def prose(path: Path) -> str:
    """The document without its code blocks."""
    return re.sub(r"^( *)```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Where `#...` links into a document can lead, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def ids(path: Path) -> str:
    return path.name


COSTLY = {
    "README.md",
    "CONTRIBUTING.md",
    "calls.md",
    "compile.md",
    "concepts.md",
    "errors.md",
    "facts.md",
    "onnx.md",
    "policies.md",
    "rules.md",
    "training.md",
}
PROGRAMS = [
    pytest.param(path, marks=pytest.mark.slow) if path.name in COSTLY else path
    for path in DOCUMENTS
    if blocks(path, "python").strip()
]


SHOWN = """
for name, shown in {shown!r}.items():
    printed = [line.strip() for line in globals()[name].splitlines()]
    for line in filter(None, shown.splitlines()):
        assert line in printed, f"{{name}} has no line {{line}}"
"""


@pytest.mark.parametrize("path", PROGRAMS, ids=ids)
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    """... and what a block ```` ```ir NAME ```` shows are lines of the program's variable NAME."""
    names = re.findall(r"^```ir (\w+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    program = blocks(path, "python") + SHOWN.format(shown={name: blocks(path, "ir", name) for name in names})
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / f"{path.stem.lower()}_md.py"
    script.write_text(program, encoding="utf-8")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{path.name} (its line numbers are the document's):\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_blocks_that_do_not_run_are_python(path: Path) -> None:
    ast.parse(blocks(path, "python", "no-run"), filename=path.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_exist(path: Path) -> None:
    """Every `make` target and every option of `tokgraph` in a shell block exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in blocks(path, "bash").splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if re.fullmatch("[a-z-]+", word)} <= targets, line
        elif words[:1] == ["tokgraph"]:
            command = tokgraph_command.commands[words[1]]
            known = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
            assert {word for word in words if word.startswith("-")} <= known | {"--help"}, line


def test_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.TokgraphError)]
    described = dict(re.findall(r"^## (TG\d{3}): (\w+)$", text, flags=re.MULTILINE))
    assert described == {c.code: c.__name__ for c in classes if c is not errors.TokgraphError}


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_policy_is_documented(name: str) -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "concepts.md"):
        assert re.search(rf"^\| `{name}` \|", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path.name


def test_every_pass_is_documented() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    waiting, names = [GraphPass], []
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting += subclasses
        names += [c.name for c in subclasses if c.__module__.startswith("tokgraph.")]
    assert names
    for name in names:
        assert f"`{name}`" in text, name


def test_every_rule_family_is_documented() -> None:
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for path in (ROOT / "passes" / "rules").glob("*.py"):
        assert path.stem.startswith("_") or f"`{path.name}`" in text, path.name


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{tokgraph.__version__}]" in text
