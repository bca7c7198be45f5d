"""README, docs and the files beside them: short enough to be read, links that lead somewhere, one version, one
address.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from transformers_tiedmoe import __version__, hub

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels/README.md") if path.is_file()]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MADE = ("_ops.py", "demo/report.md")  # by programs
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_readme_is_a_front_door():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    assert not [line for line in lines if len(line) > 119]
    text = "\n".join(lines)
    assert text.index("make demo") < text.index("\n## ")  # runnable before the first heading
    assert f"git clone {PROJECT['urls']['Repository']}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    targets = [each for each in re.findall(r"\]\(([^)\s]+)", page.read_text()) if "://" not in each]
    assert not [each for each in targets if not _leads_somewhere(page, *each.partition("#")[::2])]


def _leads_somewhere(page: Path, path: str, anchor: str) -> bool:
    target = page.parent / path if path else page
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text()), re.MULTILINE) if anchor else []
    return not anchor or anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


def test_a_link_to_a_missing_file_or_heading_is_noticed():
    page = ROOT / "docs/index.md"
    assert _leads_somewhere(page, "conversion.md", "killed-or-out-of-disk")
    assert not _leads_somewhere(page, "conversion.md", "no-such-heading")
    assert not _leads_somewhere(page, "no_such_page.md", "")


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    assert not [
        path.name for path in ROOT.glob("docs/*.md") if path.name != "index.md" and f"({path.name})" not in index
    ]


@pytest.mark.parametrize("page", [each for each in PAGES if each.name != "log.md"], ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page):
    names = re.findall(r"`(\w[\w./*-]*(?:\.(?:py|md|ya?ml|toml|txt|cff|nix)|/))`", FENCE.sub("", page.read_text()))
    folders = [ROOT, page.parent, *(ROOT / each for each in ("kernels/torch-ext", "conversion", "src", "examples"))]
    missing = [name for name in names if name not in MADE and not any(_any_file(folder, name) for folder in folders)]
    assert not missing


def _any_file(folder: Path, name: str) -> bool:
    return any(folder.glob(name.rstrip("/"))) or any(folder.glob(f"*/{name}")) or any(folder.glob(f"*/*/{name}"))


def test_the_tree_in_contributing_is_the_real_one():
    """Every file and folder it names exists, and every folder of the packages is named."""
    tree = re.search(r"```text\n(src/.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    names, top = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        top = name if not line.startswith(" ") else top
        names.add(name if name == top else top + name)
    assert not [name for name in names if not (ROOT / name).exists()]
    for package in ("src/transformers_tiedmoe", "conversion/tiedmoe_conversion"):
        folders = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / package).glob("*/__init__.py")}
        assert folders <= names


def test_one_version_and_one_address():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert f">={__version__}'" in hub.STUB
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert all(url.startswith(PROJECT["urls"]["Repository"]) for url in PROJECT["urls"].values())
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_both_papers_are_cited():
    citation = (ROOT / "CITATION.cff").read_text()
    for number in ("2606.16825", "2606.17952"):
        assert f"arXiv:{number}" in citation
        assert f"arXiv:{number}" in (ROOT / "README.md").read_text()


def test_pre_commit_runs_the_ruff_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
