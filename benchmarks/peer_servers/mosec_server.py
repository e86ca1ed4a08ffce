"""MiniLM behind mosec: `python mosec_server.py --port PORT`, the checkpoint in $CHECKPOINT.

One worker, batches of up to 32 that wait at most 10 ms; a text comes as a JSON string and its vector goes back as the bytes of
float32, the cheapest answer that mosec can give. Run by peers.py in mosec's own interpreter; knows nothing of openbook.
"""

import os

from mosec import Server, Worker
from sentence_transformers import SentenceTransformer


class Embedder(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.model = SentenceTransformer(os.environ["CHECKPOINT"], device="cpu")
        self.forward(["warm up"])

    def forward(self, data):
        return list(self.model.encode(data, batch_size=len(data), normalize_embeddings=True, show_progress_bar=False))

    def serialize(self, data) -> bytes:
        return data.astype("<f4").tobytes()


if __name__ == "__main__":
    server = Server()
    server.append_worker(Embedder, num=1, max_batch_size=32, max_wait_time=10)
    server.run()
