"""The documentation says nothing that does not run: the blocks of each page in one folder, in order."""

import re

import pytest

from ase_gffmerge.merging.report import GOOD, USABLE
from helpers.page_blocks import ROOT, Page, shared_folder

DOCS = ROOT / "docs"
PAGES = [
    Page(str(path.relative_to(ROOT)))
    for path in sorted(DOCS.rglob("*.md"))
    if not {"_build", "generated"} & set(path.parts)
]
RUN = [page for page in PAGES if any(block[:2] == ("runs", "test") for block in page.blocks)]
ELSEWHERE = ("/workflows.md", "/openmm.md")
HERE = [page for page in RUN if "/vendors/" not in page.name and not page.name.endswith(ELSEWHERE)]
"""Pages of other packages run in environments of these: ``integrations/test_pages.py`` and tests named like the page."""

NIGHTLY = (
    *("docs/how_to/choose_a_method.md", "docs/how_to/trust.md", "docs/how_to/small_and_fast.md"),
    *("docs/how_to/calibration_frames.md", "docs/how_to/convert.md", "docs/tutorials/md_two_molecules.md"),
)
"""Too long for ``.ci/run``."""


def marks(page: Page) -> list[pytest.MarkDecorator]:
    """What a page says of itself."""
    return [pytest.mark.slow] * page.slow + [pytest.mark.nightly] * (page.name in NIGHTLY)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=marks(page), id=page.name) for page in HERE],
)
def test_blocks_run_in_order(page: Page, tmp_path_factory: pytest.TempPathFactory, merge_cache) -> None:
    for package in page.needs:
        pytest.importorskip(package)
    assert page.finished(shared_folder(tmp_path_factory), merge_cache).is_dir()


def test_every_block_is_marked() -> None:
    assert [page.name for page in PAGES if page.unmarked and page.name != "docs/explanation/trials.md"] == []
    assert {block[1] for page in PAGES for block in page.blocks if block[0] == "runs"} == {"test"}


def test_links_and_files_exist() -> None:
    missing = []
    for page in PAGES:
        here = (ROOT / page.name).parent
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.text)
        missing += [
            f"{page.name}: {link}"
            for link in links
            if "generated/" not in link and not (here / link).exists()
        ]
        named = re.findall(r"[` ]((?:md_examples|tests|ase_gffmerge)/[\w/]+\.\w+)", page.text)
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_thresholds_are_those_of_the_report() -> None:
    text = (DOCS / "how_to" / "read_the_report.md").read_text(encoding="utf-8")
    assert re.findall(r"below (\d+) %", text) == [f"{100 * GOOD:.0f}", f"{100 * USABLE:.0f}"]


def test_pictures_of_the_pages_exist() -> None:
    pictures = re.findall(
        r"!\[[^\]]*\]\((?:\.\./)?(?:docs/)?(pictures/\S+)\)", "".join(p.text for p in PAGES)
    )
    assert [picture for picture in pictures if not (DOCS / picture).exists()] == []
