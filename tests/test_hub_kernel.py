"""kernels/ as a Hub kernel: laid out as Hugging Face's kernel-builder does it, loaded by Hugging Face's `kernels`.

kernel-builder itself needs nix. What it does to a `[torch-noarch]` kernel is little: it copies the Python package and
writes `metadata.json` and `_ops.py` (huggingface/kernels, kernel-builder/src/pyproject/torch/noarch.rs).
"""

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path

import jinja2
import pytest
import torch

import tiedmoe_kernels

# By a submodule: where Hugging Face's package is absent, `import kernels` run from the repository finds our folder.
get_local_kernel = pytest.importorskip(
    "kernels.load", reason="Hugging Face's `kernels` is not installed"
).get_local_kernel

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
PACKAGE = KERNELS / "torch-ext/tiedmoe_kernels"
GENERAL = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
REGISTRATIONS = {
    "custom_op",
    "triton_op",
    "register_kernel",
    "register_fake",
    "register_vmap",
    "register_torch_dispatch",
}
OPS_PY = """
import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
"""


@pytest.fixture(scope="module", params=["a1b2c3d", "0f1e2d3"])
def hub_kernel(request, tmp_path_factory):
    """Two revisions, one after the other: the second is loaded beside the first and beside the pip package."""
    repository = tmp_path_factory.mktemp("hub")
    variant = repository / "build/torch-cpu"
    extensions = {
        f".{extension}" for extension in tomllib.loads((KERNELS / "build.toml").read_text())["torch-noarch"]["pyext"]
    }
    for path in PACKAGE.rglob("*"):
        if path.suffix in extensions:
            (variant / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, variant / path.relative_to(PACKAGE))
    name = f"_{GENERAL['name'].replace('-', '_')}_cpu_{request.param}"
    assert not (variant / "_ops.py").exists(), "kernel-builder writes this file and stops where it exists"
    (variant / "_ops.py").write_text(OPS_PY.format(id=name))
    metadata = {key: GENERAL[key] for key in ("name", "version", "license")}
    metadata |= {"id": name, "python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    module = get_local_kernel(repository, backend="cpu")
    assert module.__name__ == name
    assert Path(module.__file__) == variant / "__init__.py"
    return module


def arguments(dtype=torch.float32):
    T, H, I, E, K = 6, 8, 16, 4, 2
    x, weights = torch.randn(T, H, dtype=dtype), torch.rand(T, K, dtype=dtype)
    gate_up_proj, down_proj = torch.randn(E, 2 * I, H, dtype=dtype), torch.randn(E, H, I, dtype=dtype)
    index = torch.randint(0, E + 1, (T, K))  # E is an inactive slot
    floating = [tensor.requires_grad_() for tensor in (x, weights, gate_up_proj, down_proj)]
    return (x, index, weights, gate_up_proj, down_proj), floating


def test_build_toml_is_what_the_builder_reads():
    from kernels._rust import Build  # kernel-builder's own parser, which `kernels` ships; it refuses unknown keys

    backends = [str(backend).rpartition(".")[2].lower() for backend in Build.open(KERNELS).general.backends]
    assert backends == GENERAL["backends"]


def test_hub_kernel_computes_what_the_reference_computes(hub_kernel):
    args, floating = arguments(torch.float64)
    expected = tiedmoe_kernels.experts_forward_reference(*args)
    actual = hub_kernel.experts_forward(*args)
    torch.testing.assert_close(actual, expected)
    grad_output = torch.randn_like(expected)
    for ours, reference in zip(
        torch.autograd.grad(actual, floating, grad_output), torch.autograd.grad(expected, floating, grad_output)
    ):
        torch.testing.assert_close(ours, reference)


def test_hub_kernel_and_package_live_in_one_process(hub_kernel):
    assert hub_kernel is not tiedmoe_kernels
    assert set(hub_kernel.__all__) == set(tiedmoe_kernels.__all__)
    args, floating = arguments()
    results = {}
    for module in (tiedmoe_kernels, hub_kernel):
        y = module.experts_forward(*args)
        results[module] = [y, *torch.autograd.grad(y.square().sum(), floating)]
    for ours, hubs in zip(*results.values()):
        assert torch.equal(ours, hubs)


def test_custom_ops_have_a_namespace_of_their_own(hub_kernel):
    ops = {name.partition("::") for name in torch._C._dispatch_get_all_op_names()}
    ours, hubs = ({op for space, _, op in ops if space == module.__name__} for module in (tiedmoe_kernels, hub_kernel))
    assert ours == hubs
    assert ours


def test_every_registration_uses_the_namespace():
    """The rule that kernel-builder's torch-ops-check hook enforces on functions and classes of a module, kept
    everywhere.
    """
    registrations = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and decorator.args and called(decorator) in REGISTRATIONS:
                        first = decorator.args[0]
                        assert isinstance(first, ast.Call), f"{path.name}:{node.lineno}"
                        assert called(first) == "add_op_namespace_prefix", f"{path.name}:{node.lineno}"
                        registrations += 1
    assert registrations


def called(call):
    return getattr(call.func, "id", getattr(call.func, "attr", None))


def test_card_lists_what_the_package_offers():
    """Filled as the builder does it: `functions` is a literal `__all__` of the package, read without importing it."""
    (assignment,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    functions = ast.literal_eval(assignment.value)
    assert functions == tiedmoe_kernels.__all__
    card = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        (KERNELS / "CARD.md").read_text()
    )
    text = card.render(
        repo_id="someone/tiedmoe-kernels", version=1, license="apache-2.0", functions=functions, source=None
    )
    assert 'get_kernel("someone/tiedmoe-kernels", version=1' in text
    listed = re.findall(r"^- `(\w+)`$", text, re.MULTILINE)
    assert listed == [name for name in functions if name != "__version__"]
    for name in re.findall(r"experts\.(\w+)\(", text):  # what the example calls
        assert name in functions
