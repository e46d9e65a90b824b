"""What can go wrong with a checkpoint."""


class SaveError(OSError):
  """A checkpoint could not be saved; what was there before is untouched."""


class CheckpointError(ValueError):
  """A folder is no checkpoint of ours, is damaged, or does not fit what is asked of it."""
