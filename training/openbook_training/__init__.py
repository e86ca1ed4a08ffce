"""Training of openbook's models in PyTorch: checkpoints and corpora in, adapters and metrics out.

Knows nothing of the server; what both must agree on travels in the exported graph or the bundle.
"""
