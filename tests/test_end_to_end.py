"""The product, as its user runs it: train, export, index, serve, ask, all by the command line, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = "red blue green one two three city river king book".split()
LABELLED = [
    (f"the {WORDS[number % 2]} {WORDS[6 + number % 4]} of {WORDS[3 + number % 3]}", ("warm", "cold")[number % 2]) for number in range(16)
]


def openbook(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and insist on its exit status."""
    command = [sys.executable, "-m", "openbook.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose reader and classifier went through `openbook train` and whose graphs through `openbook export`."""
    folder = tmp_path_factory.mktemp("product")
    rows = []
    for number in range(16):
        answer = WORDS[number % 10]
        context = f"the {WORDS[(number + 3) % 10]} of {answer} was {WORDS[(number + 5) % 10]}"
        rows.append({"id": f"q{number}", "question": f"what was {answer} ?", "context": context, "answers": {"text": [answer]}})
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "reader.toml").write_text(
        f'output = "{folder}/run"\ncheckpoint = "{tiny_checkpoint}"\ntrain = "{folder}/train.jsonl"\n'
        "held_out = 3\nmax_tokens = 64\nstride = 8\nmax_question_tokens = 16\nmax_answer_tokens = 5\nnegatives = [1]\n"
        'lora_rank = 2\nlora_alpha = 2\n[loop]\nepochs = 1\nbatch_examples = 4\nprecision = "fp32"\n'
    )
    openbook("train", "reader", folder / "reader.toml")
    (folder / "labelled.csv").write_text("text,colour\n" + "".join(f"{text},{colour}\n" for text, colour in LABELLED))
    (folder / "classifier.toml").write_text(
        f'output = "{folder}/colours"\ncheckpoint = "{tiny_checkpoint}"\ntrain = "{folder}/labelled.csv"\nlabel_column = "colour"\n'
        "held_out = 4\nmax_tokens = 24\nneighbours = 3\nlora_rank = 2\nlora_alpha = 2\n"
        '[loop]\nepochs = 1\nbatch_examples = 4\nprecision = "fp32"\n'
    )
    openbook("train", "classifier", folder / "classifier.toml")
    task = f"colours={folder / 'colours' / 'best'}"
    openbook("export", tiny_checkpoint, folder / "bundle", "--reader", folder / "run" / "best", "--task", task)
    return folder / "bundle"


@pytest.fixture(scope="module")
def knowledge_base(bundle: Path) -> Path:
    folder = bundle.parent / "documents"
    folder.mkdir()
    (folder / "rivers.txt").write_text("The blue river runs to the city.\n\nOne king read the book.")
    (folder / "kings.md").write_text("# Kings\n\nThe red king was two in the green city.")
    openbook("index", bundle, bundle.parent / "kb", folder)
    return bundle.parent / "kb"


@pytest.fixture(scope="module")
def server(bundle: Path, knowledge_base: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "openbook.cli", "serve", str(bundle), str(knowledge_base), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(r"serving .* on (127\.0\.0\.1:\d+)", line):
            yield found.group(1)
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            process.stderr.close()
            assert process.wait(timeout=60) == 0
            assert "stopped" in rest
            assert "king" not in "".join(seen) + rest  # questions are never logged
            return
    pytest.fail("the server did not start:\n" + "".join(seen))


def test_a_question_is_answered_from_the_documents_with_its_source(server: str, knowledge_base: Path) -> None:
    reply = json.loads(openbook("ask", "who read the book ?", "--server", server, "--json").stdout)
    assert reply["question"] == "who read the book ?"
    assert {hit["document_id"] for hit in reply["hits"]} == {"rivers.txt", "kings.md"}
    for answer in reply["answers"]:
        text = (knowledge_base.parent / "documents" / answer["document_id"]).read_text()
        assert answer["text"] in text
        assert 0 <= answer["probability"] <= 1
    assert reply["timings_ms"]["total"] > 0


def test_a_file_of_questions_is_answered_row_by_row(server: str, tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": "who was red ?"}, {"id": "b", "question": "what was blue ?"}, {"_id": "c", "text": ""}]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    openbook("ask", "--file", tmp_path / "questions.jsonl", "--out", tmp_path / "answers.jsonl", "--server", server, status=3)
    answered = {row["id"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert answered["a"]["answers"]
    assert answered["b"]["hits"]
    assert not answered.get("c", {}).get("answers")


def test_no_question_of_a_long_file_is_left_out(server: str, tmp_path: Path) -> None:
    ids = [str(number) for number in range(100)]  # several messages
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"_id": id_, "text": "who was red ?"}) for id_ in ids))
    openbook("ask", "--file", tmp_path / "questions.jsonl", "--out", tmp_path / "answers.jsonl", "--server", server)
    assert [json.loads(line)["id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == ids


def test_search_embed_and_info_speak_to_the_same_server(server: str, bundle: Path, knowledge_base: Path) -> None:
    hits = json.loads(openbook("search", "blue river", "--server", server, "--mode", "lexical", "--json").stdout)
    assert hits["hits"][0]["document_id"] == "rivers.txt"
    openbook("embed", "blue river", "--server", server)
    for target in (server, bundle, knowledge_base):
        assert openbook("info", target).stdout


def test_documents_come_and_go_while_the_server_answers(server: str, tmp_path: Path) -> None:
    rows = [{"_id": f"z{number % 40}", "text": f"The zebra number {number} read one book.", "herd": number % 4} for number in range(41)]
    (tmp_path / "zebras.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    sent = openbook("upsert", tmp_path / "zebras.jsonl", "--server", server, status=3)
    assert sent.stdout == "40 created, 1 replaced, 1 unreadable\n"
    assert "line 42" in sent.stderr
    found = json.loads(openbook("search", "zebra", "--server", server, "--mode", "lexical", "--top-k", "100", "--json").stdout)
    assert {hit["document_id"] for hit in found["hits"]} == {f"z{number}" for number in range(40)}
    herd = ["search", "zebra", "--server", server, "--filter", "herd=3", "--json"]
    assert {hit["metadata"]["herd"] for hit in json.loads(openbook(*herd).stdout)["hits"]} == {"3"}
    assert "KEY=VALUE" in openbook("ask", "zebra", "--filter", "herd", status=2).stderr
    assert openbook("upsert", tmp_path / "zebras.jsonl", "--server", server, status=3).stdout.startswith("2 replaced, 39 unchanged")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "yaks.txt").write_text(f"Folder {folder} has yaks.")
        (tmp_path / folder / "yaks.docx").touch()
    assert "other formats are left out (.docx)" in openbook("upsert", tmp_path / "one", "--server", server).stderr
    again = openbook("upsert", tmp_path / "two", "--server", server)
    assert (again.stdout, f"yaks.txt takes the place of {tmp_path}/one/yaks.txt: " in again.stderr) == ("1 replaced\n", True)
    assert openbook("delete", "yaks.txt", "--server", server).stdout == "yaks.txt: deleted, 1 passages\n"
    assert openbook("delete", "z0", "none", "--server", server).stdout == "z0: deleted, 1 passages\nnone: absent\n"
    ids = [f"z{number}" for number in range(1, 40)]
    openbook("delete", *ids, "--server", server)
    assert not json.loads(openbook("search", "zebra", "--server", server, "--mode", "lexical", "--json").stdout)["hits"]
    refused = openbook("delete", "", "--server", server, status=1)
    assert "ids[0]" in refused.stderr


def test_texts_are_labelled_beside_labelled_texts_that_are_stored(server: str, tmp_path: Path) -> None:
    before = json.loads(openbook("classify", "the red king", "--server", server, "--json").stdout)
    assert {label["label"] for label in before["labels"]} == {"warm", "cold"}
    assert before["passages"] == 0
    rows = [{"_id": f"l{number}", "text": text, "colour": colour} for number, (text, colour) in enumerate(LABELLED)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    openbook("upsert", tmp_path / "labelled.jsonl", "--server", server)
    shown = openbook("classify", "the red king of one", "--server", server, "--explain").stdout
    assert shown.count("neighbour ") == 3
    assert "their vote" in shown
    openbook("classify", "--file", tmp_path / "labelled.jsonl", "--out", tmp_path / "labels.jsonl", "--server", server, "--explain")
    labelled = list(map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines()))
    assert [row["id"] for row in labelled] == [row["_id"] for row in rows]
    for row, given in zip(labelled, rows, strict=True):
        assert row["passages"] == len(row["neighbours"]) == 3
        assert row["neighbours"][0]["label"] == given["colour"]  # its own stored self
        assert sum(label["probability"] for label in row["labels"]) == pytest.approx(1, abs=1e-4)
    openbook("delete", *(row["_id"] for row in rows), "--server", server)
    assert "classifier colours" in openbook("info", server).stdout


def test_a_second_server_on_the_same_knowledge_base_is_refused(server: str, bundle: Path, knowledge_base: Path) -> None:
    refused = openbook("serve", bundle, knowledge_base, "--port", "0", status=1)
    assert "openbook serve:" in refused.stderr
    assert str(knowledge_base) in refused.stderr


def test_a_tampered_bundle_is_refused_by_the_name_of_the_file(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in bundle.iterdir():
        os.link(file, copy / file.name)
    graph = copy / "embedder.fp32.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.unlink()
    graph.write_bytes(data)
    assert "embedder.fp32.onnx" in openbook("serve", copy, status=1).stderr
