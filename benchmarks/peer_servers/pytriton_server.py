"""MiniLM behind NVIDIA's Triton through pytriton: `python pytriton_server.py PORT`, the checkpoint in $CHECKPOINT.

Dynamic batches of up to 32, no delay; texts and vectors travel as Triton's own tensors. Run by peers.py in pytriton's own
interpreter; knows nothing of openbook.
"""

import os
import sys


def main() -> None:
    import numpy as np  # here, for Triton's processes import this file again and must not load PyTorch
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(os.environ["CHECKPOINT"], device="cpu")

    @batch
    def embed(text):
        texts = [row[0].decode() for row in text]
        return [model.encode(texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False).astype(np.float32)]

    config = TritonConfig(http_address="127.0.0.1", http_port=int(sys.argv[1]), allow_grpc=False, allow_metrics=False, log_verbose=0)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="embedder",
            infer_func=embed,
            inputs=[Tensor(name="text", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="vector", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
