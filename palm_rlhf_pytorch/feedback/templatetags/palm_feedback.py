"""Filters of the templates: words of a text, numbers as people read them."""

from django.template import Library

register = Library()


@register.filter
def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


@register.filter
def thousands(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


@register.filter
def percent(share: float) -> str:
    """A share as whole percents."""
    return f"{share:.0%}"
