"""Pages for what went wrong: what happened, what was stored, where to go on. They need no session and no person."""

from django.core.exceptions import DisallowedHost, RequestDataTooBig
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string

TITLES = {
    400: "This could not be understood",
    403: "This page is too old",
    404: "Nothing here",
    413: "Too much text",
    429: "Too fast",
    500: "Something went wrong here",
    503: "Busy for a moment",
}


def error_page(status: int, message: str, *, retry: int | None = None) -> HttpResponse:
    """A page that says what happened.

    Args:
        status: of HTTP, one of TITLES.
        message: a sentence or two for the person.
        retry: seconds after which to try again.
    """
    context = {"status": status, "title": TITLES[status], "message": message}
    response = HttpResponse(render_to_string("palm_feedback/error.html", context), status=status)
    response.headers["Cache-Control"] = "no-store"
    if retry is not None:
        response.headers["Retry-After"] = str(retry)
    return response


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """400, or 413 where a form was too large."""
    if isinstance(exception, RequestDataTooBig):
        return error_page(413, "What was sent is larger than any note may be. Nothing was stored.")
    if isinstance(exception, DisallowedHost):
        return error_page(400, "The server does not answer to this name: see --allowed-host.")
    return error_page(400, "The browser sent something that makes no sense here. Nothing was stored.")


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """404."""
    return error_page(404, "There is no such page, or no such project any more.")


def server_error(request: HttpRequest) -> HttpResponse:
    """500; what happened is in the server's log."""
    return error_page(500, "What you sent last may not have been stored; it is safe to send it again.")


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """403: a form from before the last login, or from elsewhere."""
    return error_page(
        403, "Its form is from before you logged in, or from elsewhere. Nothing was stored: open the page again."
    )
