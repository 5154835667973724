"""The one error type that a user is meant to read."""


class LitseekError(Exception):
    """A mistake outside the code: a file, a checkpoint, data or a disk. The message is one sentence that names it.

    Configuration mistakes raise ``ValueError`` instead; the command line prints both without a traceback.
    """


class Preempted(LitseekError):
    """The run was asked to stop, and stopped with everything saved; a scheduler may start it again."""
