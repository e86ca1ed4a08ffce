"""The structure that the design promises: imports point one way, and the stubs are what the protocol generates."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "openbook": ROOT / "protos" / "openbook",
    "openbook_server": ROOT / "server" / "openbook_server",
    "openbook_training": ROOT / "training" / "openbook_training",
    "openbook_export": ROOT / "export" / "openbook_export",
}
MAY_IMPORT: dict[str, set[str]] = {
    "openbook": set(),
    "openbook_server": {"openbook"},
    "openbook_training": set(),
    "openbook_export": {"openbook", "openbook_server", "openbook_training"},
}
NEVER = {
    "openbook": {"torch", "transformers", "onnxruntime", "tokenizers", "hnswlib"},
    "openbook_server": {"torch", "transformers", "optimum"},
    "openbook_training": {"onnxruntime", "grpc", "hnswlib"},
    "openbook_export": set(),
}


def imports(folder: Path) -> set[tuple[str, str]]:
    """(file, top-level module) of every import statement below a folder."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            found |= {(file.name, name.partition(".")[0]) for name in names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    forbidden = (set(PACKAGES) - MAY_IMPORT[package] - {package}) | NEVER[package]
    assert [pair for pair in sorted(imports(PACKAGES[package])) if pair[1] in forbidden] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_stay_small(package: str) -> None:
    long = {str(file.name): lines for file in PACKAGES[package].rglob("*.py") if (lines := len(file.read_text().splitlines())) > 320}
    assert {name: lines for name, lines in long.items() if "_pb2" not in name} == {}


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    for kind in ("python", "grpc_python", "mypy", "mypy_grpc"):
        command.append(f"--{kind}_out={tmp_path}")
    command += [
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
    ]
    protocol = sorted((ROOT / "protos" / "openbook" / "v1").glob("*.proto"))
    subprocess.run([*command, *map(str, protocol)], check=True, capture_output=True)
    generated = sorted((tmp_path / "openbook" / "v1").iterdir())
    assert len(generated) == 4 * len(protocol)
    for file in generated:
        assert file.read_text() == (PACKAGES["openbook"] / "v1" / file.name).read_text(), file.name
