"""What a user can cause. The page and the commands show these messages as they are."""


class TaptError(Exception):
    """Base of every error whose message is meant for the person who caused it."""


class InputError(TaptError, ValueError):
    """An argument is outside what is allowed; the message names it, the rule and the value."""


class BackboneError(TaptError):
    """A backbone is unknown, its weights are missing, or a tower cannot take prompts."""


class PackError(TaptError):
    """A prompt pack is missing, malformed, or was made for another backbone."""


class HubError(TaptError):
    """A repo of the Hub is missing, refused, too large or damaged, or cannot be reached."""


class DataError(TaptError):
    """A data set is missing or not laid out as expected."""


class Cancelled(TaptError):
    """The person stopped a running attack or tuning step."""
