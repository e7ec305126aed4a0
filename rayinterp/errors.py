"""The one exception that is the user's to mend: shown without a traceback, before anything expensive starts."""


class UserError(Exception):
    """Something in the config, the machine or the input is wrong.

    The message names the field, the value it got and what to do about it.
    """


class EngineError(RuntimeError):
    """A model failed while it computed: the request may succeed on another replica."""
