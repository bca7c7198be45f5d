"""The house's rules: imports go one way and in no circle, names do not hide modules, two folders are no packages."""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# By package, where it is; a package imports itself and those above it here. The command line and the demo stand on all
# of them.
PACKAGES = {
    "tiedmoe_kernels": "kernels/torch-ext",
    "transformers_tiedmoe": "src",
    "tiedmoe_conversion": "conversion",
    "tiedmoe_demo": "examples",
    "tiedmoe_cli": "src",
}
MAY_IMPORT_ALL = ("tiedmoe_cli", "transformers_tiedmoe.cli")


def modules() -> dict[str, Path]:
    """Every file of the packages by module name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str) -> set[str]:
    """The modules of ours that a file imports: at the top, in functions and for type checkers alike."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            target = name if name in MODULES else name.rpartition(".")[0]
            # A name taken from a package comes through its __init__, but not from a file of that package itself.
            if target in MODULES and target != module and not package.startswith(target):
                found.add(target)
    return found


GRAPH = {module: imported(module) for module in MODULES}


def test_the_graph_is_read():
    assert "transformers_tiedmoe.modeling_tiedmoe" in GRAPH["transformers_tiedmoe"]
    assert "tiedmoe_conversion.plan" in GRAPH["tiedmoe_conversion.run"]
    assert "transformers_tiedmoe.workdir" in GRAPH["tiedmoe_conversion.run"]


def test_no_circle_of_files():
    done, path = set(), []

    def visit(module: str) -> None:
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for each in sorted(GRAPH[module]):
            visit(each)
        path.pop()
        done.add(module)

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    order = list(PACKAGES)
    allowed = set(order[: order.index(package) + 1])
    for module in GRAPH:
        if module.partition(".")[0] != package or module.startswith(MAY_IMPORT_ALL):
            continue
        packages = {each.partition(".")[0] for each in GRAPH[module]}
        assert packages <= allowed, (module, packages - allowed)


def test_the_idea_and_the_model_know_nothing_above_them():
    """A newcomer reads four files; none of them may lead into training, conversion or audit."""
    for module in ("pools", "residual", "families", "configuration_tiedmoe", "modeling_tiedmoe", "experts_interface"):
        found = {each.split(".")[1] for each in GRAPH[f"transformers_tiedmoe.{module}"] if "." in each}
        assert not found & {"training", "audit", "workdir", "cli"}, module


def test_routing_knows_nothing_of_training_or_audit():
    """But for the definitions of metrics, of which there is one each, and which know of nothing here."""
    definitions = "transformers_tiedmoe.audit.metrics"
    assert GRAPH[definitions] <= {"transformers_tiedmoe.audit"}
    assert GRAPH["transformers_tiedmoe.audit"] <= {"transformers_tiedmoe"}
    for module in GRAPH:
        if module.startswith("transformers_tiedmoe.routing"):
            found = {each.split(".")[1] for each in GRAPH[module] - {definitions} if "." in each}
            assert not found & {"training", "audit", "modeling_tiedmoe", "configuration_tiedmoe"}, module


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_hides_a_module(package):
    """`from .convert import convert` in a package would leave a function where its module was."""
    root = importlib.import_module(package)
    if f"{package}.api" in MODULES:  # its names are handed out when they are first asked for
        for name in importlib.import_module(f"{package}.api").__all__:
            getattr(root, name)
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        if info.name.endswith(("__main__", ".cli")):
            continue
        module = importlib.import_module(info.name)
        parent, _, name = info.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, f"{info.name} is hidden by a name of {parent}"
