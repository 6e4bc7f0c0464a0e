"""The server: waitress, whose threads share one process, and so one loaded model."""

import socket
from typing import Any

from palm_rlhf_pytorch.feedback import environment

EVERYWHERE = ("0.0.0.0", "::", "[::]")
THREADS = 8
MAX_BODY = 16 * 2**20  # bytes of a request; what is larger is not even read, from whoever it comes


def names_of(host: str) -> list[str]:
    """Names by which the server is reached when it listens on `host`; of all addresses, this machine's own."""
    if host not in EVERYWHERE:
        return [] if host in (*environment.LOOPBACK, "::1") else [f"[{host}]" if ":" in host else host]
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:  # a name that nobody knows: it is still answered to
        found = set()
    return [name, *sorted(f"[{address}]" if ":" in address else address for address in found)]


def make_server(host: str, port: int, *, trusted_proxy: str | None = None) -> Any:
    """A server that listens already; `run()` serves until it is interrupted. Django is set up before.

    Args:
        host: address or name to listen on.
        port: 0 takes a free one, which `effective_port` then names.
        trusted_proxy: address of the proxy whose word on the client's address and scheme is taken; None for nobody's.

    Raises:
        ValueError: if nothing can listen there.
    """
    import waitress

    from palm_rlhf_pytorch.feedback.wsgi import application

    proxy: dict[str, Any] = {} if trusted_proxy is None else {
        "trusted_proxy": trusted_proxy,
        "trusted_proxy_headers": "x-forwarded-for x-forwarded-proto",
    }  # fmt: skip
    if not 0 <= port < 2**16:  # the system would take it modulo that
        raise ValueError(f"--port {port} must be from 0 to {2**16 - 1}")
    try:
        return waitress.create_server(
            application, host=host.strip("[]"), port=port, threads=THREADS, ident=None, max_request_body_size=MAX_BODY,
            clear_untrusted_proxy_headers=True, **proxy,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error
