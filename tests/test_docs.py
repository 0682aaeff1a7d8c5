"""What the documents say is there is there: links, configs, verbs, keys."""

import re
from pathlib import Path

import pytest

from luthier.cli import VERBS
from luthier.config import Config
from luthier.experiments.study import spec
from luthier.experiments.study.expand import check_space, expand

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(linked.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_yaml_on_a_page_is_made_of_real_keys(page: Path, tmp_path: Path) -> None:
    """Whole configs and pieces of them: what is missing from a piece is filled in."""
    fill = {"base_model": "base_model: m", "datasets": "datasets: [{path: p, type: alpaca}]"}
    for block in re.findall(
        r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if re.search("^base:", block, re.MULTILINE):  # a study
            base = [*fill.values(), "adapter: lora", "val_set_size: 10"]
            (tmp_path / "lora.yml").write_text("\n".join(base), encoding="utf-8")
            (tmp_path / "study.yml").write_text(block, encoding="utf-8")
            study = spec.read(tmp_path / "study.yml")
            assert check_space(study) if study.search else expand(study).runs
            continue
        missing = [line for key, line in fill.items() if not re.search(f"^{key}:", block, re.MULTILINE)]
        (tmp_path / "block.yml").write_text("\n".join([*missing, block]), encoding="utf-8")
        Config.load(tmp_path / "block.yml")


def test_the_readme_names_every_verb_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `luthier ([a-z-]+)", text, re.MULTILINE)) == set(VERBS)


def test_the_readme_example_is_what_a_user_would_type(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    (tmp_path / "first.yml").write_text(block[1], encoding="utf-8")
    config = Config.load(tmp_path / "first.yml")
    assert (ROOT / config.model.base_model / "config.json").is_file()
    assert (ROOT / config.data.datasets[0].path).is_file()
