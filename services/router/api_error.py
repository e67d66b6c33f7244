"""What a client is told instead of a completion."""


class ApiError(Exception):
    """An answer to the client that is no completion. ``param`` names the field at fault, if one is."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after_s = status, message, param, retry_after_s
