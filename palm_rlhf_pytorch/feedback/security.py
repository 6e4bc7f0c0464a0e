"""Middlewares: a strict Content-Security-Policy on every page, and no answer to a foreign Host."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

Answer = Callable[[HttpRequest], HttpResponse]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def content_security_policy(answer: Answer) -> Answer:
    """Let a page load nothing but our own files, and run no script that stands in it."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = answer(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        return response

    return middleware


def check_host(answer: Answer) -> Answer:
    """Refuse a request for a host that is not ours before anything answers it, static files included.

    A page elsewhere could else let its own name point to this machine, and read what we answer.
    """

    def middleware(request: HttpRequest) -> HttpResponse:
        request.get_host()  # raises DisallowedHost: 400
        return answer(request)

    return middleware
