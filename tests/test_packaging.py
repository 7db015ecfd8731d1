"""What an installation relies on; building and installing a wheel is `.ci/run`'s part."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module, resources
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import specsmallkv
from specsmallkv.config import CONFIG_DIR, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = ("constraints.txt", "constraints-peers.txt")


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(extra: str | None = None) -> set[str]:
    project = PROJECT["project"]
    requirements = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_pin_every_requirement_to_a_public_version(file):
    pinned = pins(file)
    assert required() | required("dev") <= pinned.keys()
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pinned.values())


def test_the_two_constraint_files_hold_the_two_transformers_lines():
    assert pins("constraints.txt")["transformers"].startswith("5.23.")
    assert pins("constraints-peers.txt")["transformers"].startswith("5.2.")
    assert required("peers") <= pins("constraints-peers.txt").keys()


def test_the_console_script_is_the_modules_main():
    module, name = PROJECT["project"]["scripts"]["specsmallkv"].split(":")
    assert callable(getattr(import_module(module), name))


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert OmegaConf.load(ROOT / "CITATION.cff").version == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_carries_its_data_and_finds_its_configuration():
    package = resources.files("specsmallkv")
    web = [
        f"web/{name}"
        for name in ("page.html", "style.css", "charts.js", "run.html", "run.js", "study.html", "study.js")
    ]
    assert all(package.joinpath(name).is_file() for name in ("py.typed", "data/default_prompt.txt", *web))
    assert (CONFIG_DIR / "config.yaml").is_file()
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"conf": "specsmallkv/conf"}


def test_a_draft_of_the_package_named_by_a_model_is_there_and_small():
    sources = [OmegaConf.load(file).draft for file in (CONFIG_DIR / "model").glob("*.yaml")]
    shipped = [source.removeprefix("package:") for source in sources if source.startswith("package:")]
    for directory in shipped:
        weights = resources.files("specsmallkv").joinpath(directory, "model.safetensors")
        if not weights.is_file():
            pytest.skip(f"{directory} is not made yet")
        assert len(weights.read_bytes()) <= 45 * 2**20
    assert shipped


@pytest.mark.parametrize(
    "file", sorted(Path(str(resources.files("specsmallkv") / "maps")).glob("*.safetensors")), ids=lambda f: f.name
)
def test_a_shipped_head_map_is_small_named_after_a_model_and_says_what_it_was_made_of(file):
    from specsmallkv.saved_map import load_head_map

    saved = load_head_map(f"package:maps/{file.name}")
    assert file.stat().st_size <= 2**20 and (CONFIG_DIR / "model" / f"{file.stem}.yaml").is_file()
    assert saved.facts["texts"] and saved.facts["target_fingerprint"] and saved.facts["results"]


@pytest.mark.slow
def test_the_default_pairs_head_map_is_of_the_draft_that_ships():
    """Fetches the default target, if it is not there yet; a map of other weights would be refused."""
    from specsmallkv.models import load_pair
    from specsmallkv.presets import load_model_settings

    name = "smollm2-135m"
    settings = load_model_settings(name) | {"head_map": f"package:maps/{name}.safetensors"}
    assert load_pair(ModelConfig(name, **settings), need_draft=True, quiet=True).head_map is not None


def test_the_command_line_is_there_before_torch():
    """Importing torch takes seconds; a mistake is answered, and Ctrl-C finds a run to record, before that."""
    code = "import sys, specsmallkv.run; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_is_found_where_the_package_says():
    assert specsmallkv.__all__ == sorted(specsmallkv.HOMES)
    for name, home in specsmallkv.HOMES.items():
        assert getattr(specsmallkv, name) is getattr(import_module(f"specsmallkv.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = specsmallkv.nothing
