"""What leaves the repository as a package, and what checks a change before it does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder

ROOT = Path(__file__).parents[1]


def test_a_package_holds_nothing_of_another_licence() -> None:
    packed = {file.relative_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert "training/openbook_training/command.py" in packed
    assert not [name for name in packed if name.startswith("training/adapters")]


def test_every_adapter_names_its_licence_and_where_it_stands() -> None:
    for card in [ROOT / "README.md", *(ROOT / "training" / "adapters").glob("*/README.md")]:
        assert "https://creativecommons.org/licenses/by-sa/4.0/" in card.read_text()


def test_a_check_without_an_elasticsearch_node_says_how_to_name_one(tmp_path: Path) -> None:
    (tmp_path / "clone" / ".ci").mkdir(parents=True)
    script = shutil.copy(ROOT / ".ci" / "run", tmp_path / "clone" / ".ci" / "run")
    environment = {name: value for name, value in os.environ.items() if name != "OPENBOOK_TEST_ELASTICSEARCH_NODE"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(".ci/run: no ../shared/elasticsearch beside the clone; name a command that starts a node in OPENBOOK")
