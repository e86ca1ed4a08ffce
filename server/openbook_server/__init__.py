"""The server: batches requests through onnxruntime beside an hnswlib index over a durable knowledge base.

No torch and no transformers here; a test holds it to that.
"""
