"""experiments/: every command in its table can be typed, and every picture is made from committed records."""

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from specsmallkv.config import CONFIG_DIR

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(set(re.findall(r"python experiments/(\w+)\.py", README)) - {"keep"})
SUPPORT = {"plotting", "keep"}
PICTURES = sorted(path.stem for path in (FOLDER / "pictures").glob("*.svg"))


def test_every_command_names_an_experiment_and_a_script_that_exist_and_none_is_left_out():
    experiments = set(re.findall(r"\+experiment=([\w-]+)", README))
    assert experiments == {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
    assert set(SCRIPTS) | SUPPORT == {path.stem for path in FOLDER.glob("*.py")}


def test_directories_on_the_command_lines_are_those_that_the_experiments_write():
    written = {
        directory
        for path in (CONFIG_DIR / "experiment").glob("*.yaml")
        for directory in re.findall(r"dir: (outputs/[\w-]+)-\$\{model\.name\}", path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"python experiments/\w+\.py (outputs/[\w-]+)-smollm2-135m", README))
    assert named and named <= written


def test_every_picture_that_a_text_shows_is_there_and_no_other():
    shown = set(re.findall(r"pictures/(\w+)\.svg", README))
    assert shown == set(PICTURES) and {script_of(name) for name in PICTURES} <= set(SCRIPTS) and len(shown) > 5
    front = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"experiments/pictures/(\w+)\.svg", front)) <= shown


def script_of(picture: str) -> str:
    """A picture has its script's name, and perhaps a suffix: that of other records of the kind."""
    return max((script for script in SCRIPTS if picture.startswith(script)), key=len)


@pytest.mark.parametrize("name", PICTURES)
def test_a_script_draws_its_picture_from_the_committed_records(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    picture, module = tmp_path / "picture.svg", importlib.import_module(script_of(name))
    records = FOLDER / "records" / (module.RECORDS + name.removeprefix(script_of(name)))
    monkeypatch.setattr(sys, "argv", [name, str(records), str(picture)])
    module.main()
    assert picture.stat().st_size < 200_000
    assert sentences(picture) == sentences(FOLDER / "pictures" / f"{name}.svg"), "the committed one is of others"


def sentences(picture: Path) -> set[str]:
    """Titles, axes and legends; ticks may differ between versions of matplotlib."""
    texts = {node.text or "" for node in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    found = {text for text in texts if len(text) > 8}
    assert len(found) > 2
    return found


def test_committed_records_are_small_and_hold_no_path_of_a_machine():
    files = list((FOLDER / "records").rglob("*.json"))
    assert files and sum(file.stat().st_size for file in files) < 1_000_000
    for file in files:
        assert not re.search(r'"[^"]*(/home/|/root/|/tmp/|/Users/|[A-Z]:\\)', file.read_text(encoding="utf-8")), file
