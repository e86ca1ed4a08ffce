"""The demo: start a server on Python's own documentation, ask it five questions, show answers, sources and timings."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from openbook.client import Client
from openbook.errors import ClientError

QUESTIONS = (
    "Which module provides an implementation of the heap queue algorithm?",
    "What does math.gcd return?",
    "What does the textwrap.dedent function remove?",
    "What is the default value of the start parameter of enumerate?",
    "Which exception is raised when division by zero occurs?",
)


def main(bundle: str, knowledge_base: str) -> int:
    openbook = str(Path(sys.executable).parent / "openbook")
    log = Path(knowledge_base).parent / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen([openbook, "serve", bundle, knowledge_base, "--port", "0"], stderr=stream, stdout=stream)
    try:
        address = wait_until_serving(server, log)
        print(f"\nopenbook answers from the documentation inside this Python ({address}, log in {log})\n")
        for question in QUESTIONS:
            subprocess.run([openbook, "ask", question, "--server", address, "--max-answers", "1"], check=True)
            print()
    finally:
        server.terminate()
        server.wait()
    print(
        "Next:\n"
        "  make serve                                    keep this server up, then, in another terminal:\n"
        f'  {openbook} ask "How do I sort a list in place?"\n'
        f"  {openbook} index .demo/bundle my-kb my-documents/   index your own files (txt, md, rst, html, pdf, csv, jsonl, parquet)\n"
        f"  {openbook} serve .demo/bundle my-kb                 and serve them"
    )
    return 0


def wait_until_serving(server: subprocess.Popen[bytes], log: Path) -> str:
    """The server's address, once it answers; it picked a free port and its log says which."""
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if " serving " in line:
                address = next(word for word in line.split() if word.startswith("127.0.0.1:")).rstrip(":,;")
                try:
                    with Client(address) as client:
                        client.describe()
                    return address
                except ClientError:
                    pass
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
