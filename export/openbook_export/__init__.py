"""From checkpoint to bundle: the only package that knows both the training side and the server."""
