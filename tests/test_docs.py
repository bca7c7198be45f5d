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
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [each for each in targets if "://" not in each and not (page.parent / each).exists()]
    assert not missing


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
