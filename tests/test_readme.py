"""The README: its tree has a line for each file, and what it names is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Packages of which the tree names the folder alone: their files are parts of one thing.
WHOLE = {
    "calibration",
    "comparison",
    "openai_api",
    "serving",
    "patterns",
    "quantized",
    "regions",
    "standard",
    "cpp",
    "lynx-tiny",
}


def tree() -> dict[str, str]:
    """Path -> what is said of it."""
    (block,) = re.findall(r"## The tree\n.*?```\n(.*?)```", README, re.DOTALL)
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in block.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name, _, said = line.strip().partition(" ")
        parents[indent:] = [name]
        found["".join(parents)] = said.strip()
    return found


def test_tree_has_a_line_for_each_file() -> None:
    wanted = set()
    for top in ("lynx_trt", "export", "plugins", "models"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            folder = next((number for number, part in enumerate(parts) if part in WHOLE), None)
            if folder is not None:
                wanted.add("/".join(parts[: folder + 1]) + "/")
            elif path.name != "__init__.py":
                wanted.add("/".join(parts))
    listed = tree()
    assert wanted - set(listed) == set()
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_tree_says_something_whole_of_each() -> None:
    for path, said in tree().items():
        assert said, path
        assert not said.endswith((",", ":", ";")), f"{path}: {said}"


def test_commands_and_documents_exist() -> None:
    for module in set(re.findall(r"python -m (lynx_trt[\w.]*)", README)):
        assert importlib.util.find_spec(module), module
    for document in set(re.findall(r"docs/[\w./-]+\.(?:md|png)", README)):
        assert (ROOT / document).is_file(), document
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
