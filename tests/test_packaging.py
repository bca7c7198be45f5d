"""The wheel in a fresh virtual environment, the direction of imports, and what no committed file may hold."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.xdist_group("wheel")  # one worker builds it once

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {
    "tiedmoe_cli": REPOSITORY / "src",
    "transformers_tiedmoe": REPOSITORY / "src",
    "tiedmoe_kernels": REPOSITORY / "kernels/torch-ext",
    "tiedmoe_conversion": REPOSITORY / "conversion",
    "tiedmoe_demo": REPOSITORY / "examples",
}
SHIPPED = {".py", ".typed", ".xz", ".md", ".yaml", ".json", ".j2"}


def run(*command, **kwargs):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def committed_files():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the committed and the new files alone, so that no stale build folder can help."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    committed_files()
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory):
    """The interpreter of a new virtual environment that has the wheel, and our dependencies by a .pth file.

    Python follows no .pth file inside a folder that a .pth file names, so an editable install stays out of reach.
    """
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_workers_are_told_of_groups(request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process: nothing to group")
    assert request.node.nodeid.endswith("@wheel")  # else every worker makes the slow fixtures


def test_wheel_holds_every_file_of_the_roots_and_nothing_else(wheel):
    expected = {
        path.relative_to(root).as_posix()
        for package, root in ROOTS.items()
        for path in (root / package).rglob("*")
        if path.suffix in SHIPPED and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert found == expected
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        for name in found:  # byte for byte, the corpus too
            (root,) = [root for package, root in ROOTS.items() if name.startswith(package + "/")]
            assert archive.read(name) == (root / name).read_bytes(), name
    for package in ROOTS:
        assert f"{package}/py.typed" in found
    assert any(name.startswith("tiedmoe_conversion/recipes/") for name in found)
    assert any(name.startswith("tiedmoe_kernels/configs/") for name in found)
    assert "transformers_tiedmoe/data/austen.txt.xz" in found
    assert {f"transformers_tiedmoe/audit/templates/report.{kind}.j2" for kind in ("html", "md")} <= found


def test_fresh_environment_imports_the_wheel(fresh_python, tmp_path):
    code = f"""
import sys, importlib
for name in {list(ROOTS)}:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
    print(name)
"""
    assert run(fresh_python, "-I", "-c", code, cwd=tmp_path).split() == list(ROOTS)


# Whoever asks for triton or the conversion is told that they are absent; the packages that ask are printed.
BLOCKED = """
import importlib.abc, sys


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("triton", "tiedmoe_conversion"):
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].startswith("importlib"):
                frame = frame.f_back
            print(name, "wanted by", frame.f_globals["__name__"])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("package", ["tiedmoe_kernels", "transformers_tiedmoe"])
def test_importing_a_package_needs_neither_triton_nor_the_conversion(package, fresh_python, tmp_path):
    """torch and transformers may look for triton; our packages import it in the functions that use it."""
    out = run(fresh_python, "-I", "-c", f"{BLOCKED}\nimport {package}\nprint('imported')", cwd=tmp_path)
    *wanted, last = out.splitlines()
    assert last == "imported"
    assert not [line for line in wanted if line.rpartition(" ")[2].startswith(("tiedmoe_", "transformers_tiedmoe"))]


def test_kernels_compute_on_a_cpu_without_triton(fresh_python, tmp_path):
    code = f"""{BLOCKED}
import torch, tiedmoe_kernels

x, weights = torch.randn(3, 8, requires_grad=True), torch.rand(3, 2)
pool = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
y = tiedmoe_kernels.experts_forward(x, torch.randint(0, 4, (3, 2)), weights, *pool)
y.sum().backward()
print(x.grad.isfinite().all().item())
"""
    assert run(fresh_python, "-I", "-c", code, cwd=tmp_path).splitlines()[-1] == "True"


def test_kernels_import_no_transformers(fresh_python, tmp_path):
    code = "import sys, tiedmoe_kernels; print(*({'transformers', 'transformers_tiedmoe'} & set(sys.modules)))"
    assert run(fresh_python, "-I", "-c", code, cwd=tmp_path).strip() == ""


def test_console_script_answers(fresh_python, tmp_path):
    out = run(fresh_python.with_name("tiedmoe"), "--help", cwd=tmp_path, env=os.environ | {"NO_COLOR": "1"})
    for command in ["plan", "convert", "untie", "heal", "demo"]:
        assert command in out


def imported(path, everywhere):
    """Top-level names that a file imports: anywhere, or only when it is imported itself."""
    stack, names = [ast.parse(path.read_text(encoding="utf-8"))], set()
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))
    return names


def test_imports_go_one_way():
    files = {package: sorted((root / package).rglob("*.py")) for package, root in ROOTS.items()}
    assert all(files.values())
    for path in files["tiedmoe_kernels"]:
        # No absolute import of itself either: a Hub build is imported under another name.
        assert imported(path, everywhere=True) <= {*sys.stdlib_module_names, "torch", "triton"}, path
    for path in files["transformers_tiedmoe"]:
        assert not imported(path, everywhere=False) & {"tiedmoe_conversion", "triton"}, path
    for path in files["tiedmoe_conversion"]:
        assert "triton" not in imported(path, everywhere=True), path


@pytest.mark.parametrize("folder", ["kernels", "kernels/torch-ext", "tests"])
def test_folder_is_no_package(folder):
    """kernels/__init__.py, or packages below tests/, would hide Hugging Face's `kernels`."""
    assert not (REPOSITORY / folder / "__init__.py").exists()
    if folder == "tests":
        assert not list((REPOSITORY / folder).rglob("__init__.py"))


# Written so that no pattern matches its own text.
REGISTRIES = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org"
MACHINE_PATHS = r"(?<![\w.])(/opt/(pypi|wheels)|/tmp/d[e]v|/work/(main|shared|\.)|/roo[t]/|/home/\w+/)"


def test_no_committed_file_names_a_registry_or_a_path_of_one_machine():
    pattern = re.compile(f"{REGISTRIES}|{MACHINE_PATHS}")
    assert pattern.search("see https://pypi" + ".org/simple")
    assert pattern.search("cd /tmp" + "/dev/venv")
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the corpus
        found = pattern.search(text)
        assert found is None, f"{path.relative_to(REPOSITORY)} holds {found.group()!r}"


def test_constraints_pin_exactly_what_is_needed():
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), "exact, without a local version"
    assert names == sorted(names)
    assert "torch==2.13.0" in lines
    assert not {"triton", "pip"} & set(names)


def test_uninitialised_memory_is_nan_in_these_tests():
    assert torch.empty(1000).isnan().all()
