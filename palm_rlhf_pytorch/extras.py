"""What to say where a package that an optional part stands on is not installed. Knows no part, and imports nothing.

The name on PyPI belongs to the original project; pip leaves what is installed as it is, and adds the extra's packages.
"""


def needs(what: str, package: str, *, extra: str | None) -> str:
    """The sentence of an error, with the command that brings what is missing.

    Args:
        what: cannot be had without it.
        package: what is missing; several where one cannot tell.
        extra: of this package that brings it, see setup.py; None for a package that no extra brings.
    """
    target = package if extra is None else f"palm-rlhf-pytorch[{extra}]"
    return f'{what} needs {package}: pip install "{target}"'
