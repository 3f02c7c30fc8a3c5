"""The exceptions that this package raises on purpose."""


class MUIError(Exception):
    """Base class of every exception that this package raises on purpose."""


class ProbeSetError(MUIError, ValueError):
    """A probe set cannot be read, or does not fit the tokenizer or the model it is used with."""


class UnsupportedModelError(MUIError, ValueError):
    """The model has expert layers whose weights cannot be read as they are."""


class NoExpertsError(UnsupportedModelError):
    """The model has no expert layer that can be probed."""


class ProbeError(MUIError, RuntimeError):
    """A probe pass did not see what it must see to report a right number."""


class InterruptedPassError(MUIError, RuntimeError):
    """A forward pass in which processes exchange tensors was interrupted in one, so that the others wait for it."""


class DesynchronizedError(MUIError, RuntimeError):
    """The processes of a distributed run did not come to the same point together."""
