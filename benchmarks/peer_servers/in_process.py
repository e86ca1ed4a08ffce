"""sentence-transformers in one process, without a server: `python in_process.py CHECKPOINT TEXTS.json SECONDS`.

TEXTS.json is a list of texts. They are encoded 32 at a time, as they come, once to warm up and then until SECONDS are over.
The last line is JSON: texts a second, CPU seconds a text, and the vectors of the first round as base64 of float32.
Run by peers.py in the peer's own interpreter; knows nothing of openbook.
"""

import base64
import json
import sys
import time
from pathlib import Path

from sentence_transformers import SentenceTransformer

BATCH_ROWS = 32


def main() -> None:
    checkpoint, file, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    model = SentenceTransformer(checkpoint, device="cpu")
    texts = json.loads(file.read_text())
    parts = [texts[at : at + BATCH_ROWS] for at in range(0, len(texts), BATCH_ROWS)]

    def encode(part):
        return model.encode(part, batch_size=BATCH_ROWS, normalize_embeddings=True, show_progress_bar=False)

    vectors = b"".join(encode(part).astype("<f4").tobytes() for part in parts)
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        part = parts[count % len(parts)]
        encode(part)
        count += 1
    took = time.perf_counter() - began
    encoded = sum(len(parts[number % len(parts)]) for number in range(count))
    report = {"texts_per_second": encoded / took, "cpu_seconds_a_text": (time.process_time() - used) / encoded}
    print(json.dumps(report | {"vectors": base64.b64encode(vectors).decode()}))


if __name__ == "__main__":
    main()
