"""Imports point one way: the arrows of the design, read from the source, function-local imports included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "luthier"

EVERYTHING = {
    "artifacts", "config", "data", "demo", "doctor", "errors", "evaluate", "experiments", "export", "generate",
    "kernels", "launch", "models", "objectives", "plan", "serve", "train",
}  # fmt: skip

# Part of the package -> the other parts that it may import; `errors` may be imported by all. `train` is
# refined below.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "artifacts": {"config"},
    "config": set(),
    "kernels": set(),
    "data": {"artifacts", "config"},
    "models": {"artifacts", "config", "kernels"},
    "objectives": {"kernels"},
    "plan": {"config", "data", "kernels", "models"},
    "generate": {"artifacts", "config", "data", "models"},
    "export": {"artifacts", "config", "data", "models"},
    "serve": {"config", "data", "generate", "models"},
    "evaluate": {"config", "data", "models", "kernels", "generate"},
    "train": {"config"},
    "doctor": {"config", "models"},
    "compat": {"config", "train"},
    "demo": {"config", "evaluate", "train"},
    "launch": {"config", "train"},
    "experiments": {"config"},
    "completion": {"cli", "config"},
    "api": EVERYTHING,  # and nothing imports it
    "cli": EVERYTHING,
    "__main__": {"cli"},
    "__init__": EVERYTHING | {"api"},
}
OF_MODULE: dict[str, set[str]] = {
    "launch.kubernetes.settings": {"export"},  # what a token looks like
    "train.loop": set(),
    "train.run": EVERYTHING - {"demo", "doctor", "experiments", "export", "launch", "serve"},
    "launch.worker": {"cli", "config", "train"},  # it tells its errors as the command line does
    "launch.ray.worker": {"cli", "config", "train"},  # and so does it
    "train.finish": {"config", "experiments", "plan"},  # a run ends with its report
    "evaluate.page": {"experiments"},  # a new result is on the run's page at once
    "train.passes": {"config", "data", "models"},
    "train.fsdp": {"config", "models"},
    "train.spread": {"config", "models"},
    "train.steps": {"config", "data", "models"},
    "train.weights": {"artifacts", "config", "models"},
    "train.uploads": {"artifacts", "config", "export"},  # a result goes up as `luthier push` sends it
    "train.zero": {"config", "models"},
    "train.zero_engine": {"models"},
    "train.evaluators": {"config", "data", "evaluate", "generate", "models"},
    "train.forgetting": {"config", "data", "evaluate", "models"},
    "train.preferences": {"config", "data", "evaluate", "models", "objectives"},
}
OF_LOOP = {"train.metrics", "train.checkpoint", "train.protocols"}


@dataclass(frozen=True)
class Import:
    """One import of one of our modules; `target` has no leading `luthier.`, and is empty for the package
    itself."""

    source: str
    target: str
    names: tuple[str, ...]
    line: int
    only_for_types: bool

    def __str__(self) -> str:
        return f"luthier/{self.source.replace('.', '/')}.py:{self.line} imports {self.target or 'luthier'}"


@cache
def modules() -> dict[str, ast.Module]:
    """Name without `luthier.` (a package's name for its __init__) -> syntax tree."""
    found: dict[str, ast.Module] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    only_for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        for name, names in _imported(node):
            target = name.removeprefix("luthier").removeprefix(".")
            # `from luthier.train import checkpoint` imports a module, not a name of the package.
            inner = [f"{target}.{n}".removeprefix(".") for n in names]
            targets = {i if i in modules() else target for i in inner} or {target}
            for each in sorted(targets):
                yield Import(module, each, names, node.lineno, id(node) in only_for_types)


def _imported(node: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "luthier":
                yield alias.name, ()
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        if node.module and node.module.split(".")[0] == "luthier":
            yield node.module, tuple(alias.name for alias in node.names)


def all_imports() -> list[Import]:
    return [each for module, tree in modules().items() for each in imports_of(module, tree)]


def test_every_part_has_its_rule():
    assert {part_of(module) for module in modules()} <= set(ALLOWED)


def test_arrows_of_the_design():
    wrong = []
    for each in all_imports():
        own, other = part_of(each.source), part_of(each.target)
        if each.target == "" or other == "errors" or (own == other and each.source != "train.loop"):
            continue
        allowed = OF_MODULE.get(each.source, ALLOWED[own])
        if other not in allowed and not (each.source == "train.loop" and each.target in OF_LOOP):
            wrong.append(str(each))
    assert not wrong, "\n".join(wrong)


def test_of_train_only_run_is_imported_from_outside():
    public = ("train", "train.run")  # the package itself is a function: `luthier.train(config)`
    # Whoever starts processes asks first what they will ask; a worker of Ray's gets no signals, and is told to stop.
    also = {
        ("launch.processes", "train.distributed"),
        ("launch.ray.driver", "train.distributed"),
        ("launch.ray.worker", "train.interrupt"),
        # A notebook's evaluation is that of a run, without the run.
        ("api.evaluate", "train.distributed"),
        ("api.evaluate", "train.preferences"),
    }
    wrong = [
        str(each)
        for each in all_imports()
        if part_of(each.target) == "train" and part_of(each.source) != "train"
        and each.target not in public and (each.source, each.target) not in also
    ]
    assert not wrong, "\n".join(wrong)


def test_of_the_package_itself_only_the_version_is_imported():
    wrong = [str(each) for each in all_imports() if each.target == "" and set(each.names) - {"__version__"}]
    assert not wrong, "\n".join(wrong)


def test_kernels_know_torch_and_triton_only():
    wrong = []
    for module, tree in modules().items():
        if part_of(module) != "kernels":
            continue
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            roots = {name.split(".")[0] for name in names}
            wrong += [
                f"{module} imports {r}"
                for r in roots - {"torch", "triton", "luthier"} - sys.stdlib_module_names
            ]
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other():
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for each in all_imports():
        if not each.only_for_types and each.target in graph and each.target != each.source:
            graph[each.source].add(each.target)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("source", "code", "target"),
    [
        ("data.x", "def f():\n    from luthier.models import load", "models.load"),
        ("data.x", "import luthier.train.run as r", "train.run"),
        ("train.loop", "from luthier.train.checkpoint import latest", "train.checkpoint"),
        ("cli", "if TYPE_CHECKING:\n    import luthier.config", "config"),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, code: str, target: str):
    (found,) = imports_of(source, ast.parse(code))
    assert found.target == target
    assert found.only_for_types == ("TYPE_CHECKING" in code)
