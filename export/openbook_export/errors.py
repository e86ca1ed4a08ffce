"""Every way an export fails that the user can act on; a failed export leaves nothing behind.

A checkpoint is loaded (openbook_training.errors.CheckpointNotFound), it and its reader are checked (CheckpointUnsupported),
then each graph is written, fused and compared with PyTorch (ExportFailed).
"""


class ExportError(Exception):
    """Root of the failures a command reports in one line instead of a traceback."""


class CheckpointUnsupported(ExportError):
    """The checkpoint, its tokenizer or the reader is of a shape that the bundle format cannot hold, or they do not belong together."""


class ExportFailed(ExportError):
    """A graph missed a gate: fusion did not happen, parity with PyTorch or task quality is out of tolerance."""


class OutputExists(ExportError):
    """Something stands where the bundle should go."""
