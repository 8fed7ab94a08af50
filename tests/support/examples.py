"""How many examples hypothesis tries in a test that has no number of its own: the profile's (tests/conftest.py)."""

from __future__ import annotations

from hypothesis import settings

EXAMPLES = settings().max_examples
