from pathlib import Path

from compress.docs import methods_page, with_table

ROOT = Path(__file__).resolve().parents[2]


def test_generated_pages_are_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme) == readme
    assert (ROOT / "METHODS.md").read_text(encoding="utf-8") == methods_page()


def test_pages_are_short_enough_to_be_read():
    for page, limit in {"README.md": 150, "ARCHITECTURE.md": 200, "CONTRIBUTING.md": 60}.items():
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= limit
