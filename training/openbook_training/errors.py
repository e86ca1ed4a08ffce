"""Every failure of a training run that the user can mend, each with what to do about it.

A configuration is read (InvalidConfig), a checkpoint and its data are loaded (CheckpointNotFound, InvalidData),
then steps are taken (TrainingDiverged), and what they lead to is kept (NotWritten).
"""


class TrainingError(Exception):
    """Root of the failures a command reports in one line instead of a traceback."""


class InvalidConfig(TrainingError):
    """The configuration file has mistakes; the message lists all of them at once."""


class CheckpointNotFound(TrainingError):
    """No pretrained checkpoint can be loaded under the name given."""


class InvalidData(TrainingError):
    """A data file is missing, or holds no usable row."""


class TrainingDiverged(TrainingError):
    """The loss became NaN or infinite; the message names the step and the examples of the batch."""


class NotWritten(TrainingError):
    """The disk is full, or the system refuses for something else to write a file of the run; the message names the last checkpoint."""
