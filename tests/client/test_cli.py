"""The command line as a new user tries it: manuals, wrong uses, missing parts; never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from openbook import cli
from openbook_server import runtime

NOWHERE = "127.0.0.1:9"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


@pytest.mark.parametrize("name", sorted(cli.SUBCOMMANDS))
def test_every_subcommand_has_a_manual_with_an_example_and_its_exit_status(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"openbook {name}" in out
    assert "example" in out


def test_the_first_page_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    assert {*cli.SUBCOMMANDS} <= {line.split()[0] for line in out.splitlines() if line.startswith("    ")}


# Prints something, as a subcommand that has done its work does.
PRINTS = """
import argparse, sys, types
from openbook import cli

module = types.ModuleType("prints")
module.add_arguments = lambda parser: None
module.run = lambda arguments: print({text!a}, flush={flush}) or 3
sys.modules["prints"] = module
cli.SUBCOMMANDS["ask"] = cli.Subcommand("prints", "", "")
sys.exit(cli.main(["ask"]))
"""


def test_a_command_whose_standard_output_is_closed_does_its_work() -> None:
    for closed in (">&-", ">&- 2>&-"):
        shell = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, PRINTS.format(text="done", flush=True)]
        done = subprocess.run(shell, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no full device")
@pytest.mark.parametrize("flush", [True, False])
def test_standard_output_that_takes_no_more_is_named(flush: bool) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(text="done", flush=flush)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "openbook ask: standard output cannot be written: No space left on device\n")


def test_what_the_encoding_of_standard_output_lacks_is_written_as_an_escape() -> None:
    for encoding, expected in (("ascii", b"Stra\\xdfe \\u2192 \\U0001f30d\n"), ("latin-1", b"Stra\xdfe \\u2192 \\U0001f30d\n")):
        command = [sys.executable, "-c", PRINTS.format(text="Straße → 🌍", flush=True)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stdout, done.stderr) == (3, expected, b"")


def test_an_interruption_before_anything_is_known_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Parser, "__init__", interrupt)
    assert cli.main(["info", "nowhere"]) == 130


EMPTY = (
    ("serve", "nowhere", ""),
    ("serve", ""),
    ("index", "nowhere", "", "x"),
    ("index", "nowhere", "kb", ""),
    ("upsert", ""),
    ("info", ""),
    ("tune", ""),
    ("generations", "list", ""),
    ("generations", "remove", "kb", ""),
    ("generations", "publish", "kb", ""),
    ("ask", "--file", ""),
    ("classify", "--file", ""),
    ("embed", "--file", ""),
)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "SUBCOMMAND"),
        (("frobnicate",), 2, "frobnicate"),
        (("ask",), 2, "give a question"),
        (("ask", "x", "--file", "y"), 2, "one of the two"),
        (("ask", "x", "--out", "y"), 2, "--out belongs to --file"),
        (("ask", "x", "--timeout", "inf"), 2, "no number of seconds"),
        (("ask", "x", "--timeout", "0"), 2, "no number of seconds"),
        (("ask", "x", "--timeout", "soon"), 2, "no number of seconds"),
        (("ask", "x", "--filter", "key=\udcff"), 2, "no valid UTF-8"),
        (("ask", "x", "--server", NOWHERE), 1, "openbook serve"),
        (("ask", "x", "--mode", "psychic"), 2, "psychic"),
        (("ask", "--file", "none.jsonl", "--server", NOWHERE), 1, "openbook serve"),
        (("search", "x", "--server", NOWHERE), 1, "openbook serve"),
        (("classify",), 2, "give a text"),
        (("classify", "x", "--out", "y"), 2, "--out belongs to --file"),
        (("classify", "--file", "x", "--evidence", "y"), 2, "bring their own"),
        (("classify", "x", "--server", NOWHERE), 1, "openbook serve"),
        (("classify", "--file", "none.jsonl", "--server", NOWHERE), 1, "openbook serve"),
        (("classify", "x", "--filter", "y"), 2, "KEY=VALUE"),
        (("generate",), 2, "text"),
        (("generate", "x", "--server", NOWHERE), 1, "openbook serve"),
        (("generate", "x", "--writer", "poet"), 2, "poet"),
        (("embed",), 2, "give texts"),
        (("embed", "x", "--server", NOWHERE), 1, "openbook serve"),
        (("evaluate", "squad-open", "nowhere"), 1, "queries.jsonl"),
        (("evaluate", "squad-open", "nowhere", "--json", "absent/out.json"), 1, "absent/out.json: No such file"),
        (("evaluate", "squad-open", "nowhere", "--concurrency", "0"), 2, "less than 1"),
        (("info", "nowhere"), 1, "does not exist"),
        (("info", "."), 1, "neither a bundle nor a knowledge base"),
        (("info", NOWHERE), 1, "openbook serve BUNDLE KB`, or name another's HOST:PORT\n"),
        (("serve", "nowhere"), 1, "openbook export"),
        (("serve", "nowhere", "--port", "70000"), 2, "0 to 65535"),
        (("serve", "nowhere", "--port", "x"), 2, "--port"),
        (("serve", "nowhere", "--frontends", "-1"), 2, "0 to 256"),
        (("serve", "nowhere", "--frontends", "257"), 2, "0 to 256"),
        (("serve", "nowhere", "--frontends", "x"), 2, "--frontends"),
        (("index", "nowhere", "kb", "nothing.txt"), 1, "does not exist"),
        *((given, 2, "empty; is a variable of the shell not set?") for given in EMPTY),
        (("train", "reader", "none.toml"), 1, "cannot be read"),
        (("train", "juggler", "none.toml"), 2, "juggler"),
    ],
)
def test_a_wrong_use_says_the_way_out(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    actual, _, err = run(capsys, *arguments)
    assert message in err
    assert actual == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (
            "openbook_server.command_serve",
            ("serve", "bundle", "--port", "0", "kb"),
            {"knowledge_base": "kb", "port": 0},
        ),
        (
            "openbook_server.command_serve",
            ("serve", "--port", "0", "bundle"),
            {"knowledge_base": None, "port": 0},
        ),
        ("openbook_server.command_index", ("index", "b", "k", "x", "--", "-y"), {"sources": ["x", "-y"]}),
        ("openbook_server.command_generations", ("generations", "publish", "a:1", "--timeout", "2", "n"), {"name": "n", "timeout": 2.0}),
        ("openbook.command_embed", ("embed", "a", "--timeout", "2", "b"), {"texts": ["a", "b"], "timeout": 2.0}),
        ("openbook.command_delete", ("delete", "--", "-a"), {"ids": ["-a"]}),
        ("openbook.command_ask", ("ask", "--top-k", "2", "-5 or 5?", "--json"), {"question": "-5 or 5?", "top_k": 2, "json": True}),
    ],
)
def test_options_stand_anywhere_among_the_other_arguments(
    monkeypatch: pytest.MonkeyPatch, command: str, arguments: tuple[str, ...], expected: dict[str, object]
) -> None:
    given: dict[str, object] = {}

    def run_(parsed: argparse.Namespace) -> int:
        given.update(vars(parsed))
        return 0

    monkeypatch.setattr(f"{command}.run", run_)
    assert cli.main(arguments) == 0
    assert {name: given[name] for name in expected} == expected


def test_an_unknown_argument_is_told_under_its_subcommand_s_usage(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "serve", "bundle", "kb", "more", "--prot", "1")
    assert (status, err.startswith("usage: openbook serve ")) == (2, True)
    assert "openbook serve: error: unrecognized arguments: " in err


def test_a_missing_module_is_told_as_the_extra_that_brings_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_(arguments: object) -> int:
        raise ModuleNotFoundError(name="tokenizers")

    monkeypatch.setattr("openbook_server.command_index.run", run_)
    status, _, err = run(capsys, "index", "b", "k", "s")
    assert (status, "pip install '.[server]'" in err, "tokenizers" in err) == (1, True, True)


@pytest.mark.parametrize(
    ("target", "extra"), [(["squad-open", "data"], "server"), (["reader", "checkpoint", "dev.json", "--reader", "folder"], "server,export")]
)
def test_what_a_target_of_evaluate_needs_is_told_by_the_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: list[str], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, _, err = run(capsys, "evaluate", *target)
    assert (status, "needs rich" in err, f"pip install '.[{extra}]'" in err) == (1, True, True)


def test_evaluating_a_server_needs_no_more_than_a_server_s_install(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "Who?", "metadata": {"answers": ["Ada"]}}))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    code = "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'peft', 'accelerate', 'optimum', 'onnx', 'datasets']); "
    code += "from openbook import cli; "
    code += f"sys.exit(cli.main(['evaluate', 'squad-open', {str(tmp_path)!r}, '--server', {NOWHERE!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "no server at" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("command", ["index", "upsert"])
def test_a_source_that_needs_another_extra_names_it_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    target = ["bundle", str(tmp_path / "kb")] if command == "index" else ["--server", NOWHERE]
    for source, module in ((str(tmp_path / "rows.parquet"), "pyarrow"), ("hf:squad", "datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        status, _, err = run(capsys, command, *target, source)
        assert (status, f"needs {module}" in err, "pip install '.[datasets]'" in err) == (1, True, True)
    assert not (tmp_path / "kb").exists()


@pytest.mark.parametrize(
    ("installed", "extras"),
    [
        ("onnxruntime-gpu", "server-gpu,export"),
        ("onnxruntime-openvino", "server-openvino,export"),
        ("onnxruntime", "server,export"),
        ("", "server,export"),
    ],
)
def test_an_extra_that_is_missing_is_told_beside_the_onnxruntime_that_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: str, extras: str
) -> None:
    def run_(arguments: object) -> int:
        raise ModuleNotFoundError(name="optimum")

    def distributions(*, name: str) -> list[str]:
        return [name] if name == installed else []

    monkeypatch.setattr("openbook_export.command.run", run_)
    monkeypatch.setattr("importlib.metadata.distributions", distributions)
    status, _, err = run(capsys, "export", "checkpoint", "bundle")
    assert (status, f"pip install '.[{extras}]'" in err) == (1, True)


def test_the_extras_of_servers_are_those_that_the_server_knows() -> None:
    assert {"onnxruntime": "server", **cli.SERVER_EXTRAS} == runtime.DISTRIBUTIONS


@pytest.mark.parametrize(("target", "message"), [(NOWHERE, "no server at"), (".", "pip install '.[server]'")])
def test_info_of_a_server_needs_no_more_than_the_client_s_install(target: str, message: str) -> None:
    code = "import sys; sys.modules |= dict.fromkeys(['hnswlib', 'onnxruntime', 'tokenizers']); from openbook import cli; "
    code += f"sys.exit(cli.main(['info', {target!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_defect_is_one_line_and_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for error, expected, message in ((ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops"), (KeyboardInterrupt(), 130, "")):

        def run_(arguments: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr("openbook.command_ask.run", run_)
        status, _, err = run(capsys, "ask", "x")
        assert status == expected
        assert message in err


def test_an_environment_variable_of_the_wrong_type_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBOOK_MAX_QUEUED", "many")
    status, _, err = run(capsys, "serve", "nowhere")
    assert (status, "OPENBOOK_MAX_QUEUED" in err) == (2, True)


def test_the_client_imports_nothing_of_the_server_or_the_training() -> None:
    code = "import json, sys, openbook.client, openbook.cli; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "openbook_server",
        "openbook_training",
        "openbook_export",
        "torch",
        "transformers",
        "numpy",
        "onnxruntime",
        "tokenizers",
        "hnswlib",
        "rich",
    }
    assert not heavy & set(json.loads(done.stdout))
