"""beartype as this package uses it: wrong types raise TypeError, and an int will do where a float is asked for.

Public constructors and entry points are decorated with it; it knows nothing of what they do. Of a sequence the first
item is checked: by default beartype picks one by Python's global random state, and so advances it.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

Target = TypeVar("Target", bound=Callable[..., Any])


def typecheck(target: Target) -> Target:
    """A function whose arguments are checked, or a class whose constructor's are.

    beartype is imported, and the check written, at the first call: both would make up half of this package's import.
    """
    if isinstance(target, type):
        target.__init__ = typecheck(target.__init__)  # type: ignore[misc]
        return target
    checked: Callable[..., Any] | None = None

    @wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = _checker()(target)
        return checked(*args, **kwargs)

    return cast(Target, call)


@cache
def _checker() -> Callable[..., Any]:
    from beartype import BeartypeConf, beartype

    checker: Callable[..., Any] = beartype(
        conf=BeartypeConf(violation_type=TypeError, is_pep484_tower=True, is_random=False)
    )
    return checker
