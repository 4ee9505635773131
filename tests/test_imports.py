"""Imports point one way: no cycles, recipes apart from each other, and a LoRA library that does not know FLUX."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for folder in ("flux", "lora", "kernels") for path in (ROOT / folder).rglob("*.py")}
COMMANDS = {"lora.__main__", "lora.bench"}


def imported(name: str) -> set[str]:
    """What the module imports of ours when it is imported itself."""
    names = set()
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys() - {name, "flux", "lora", "kernels"}


GRAPH = {name: imported(name) for name in FILES}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing that is left are taken away, again and again."""
    left = dict(graph)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_there_is_no_cycle():
    assert cycle(GRAPH) == []
    assert cycle(GRAPH | {"flux.errors": {"flux.weights"}})  # as every file of weights imports the errors


def test_recipes_do_not_import_each_other():
    for name, others in GRAPH.items():
        if name.startswith("flux.recipes."):
            assert not any(other.startswith("flux.recipes.") for other in others), name


def test_the_library_of_loras_knows_files_and_errors_alone():
    for name in FILES:
        if name.startswith("lora.") and name not in COMMANDS:
            assert {other for other in GRAPH[name] if other.startswith("flux")} <= {"flux.checkpoint", "flux.errors"}, name


def test_the_kernels_know_nobody():
    for name in FILES:
        if name.startswith("kernels."):
            assert all(other.startswith("kernels.") for other in GRAPH[name]), name
