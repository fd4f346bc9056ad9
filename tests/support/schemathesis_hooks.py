"""The exact rule of usernames for schemathesis, from the Unicode tables of Python."""

import schemathesis
from hypothesis import strategies as st

FIRST = st.characters(categories=["L"])
OTHERS = st.text(st.characters(categories=["L", "M"]), max_size=20)

schemathesis.openapi.format("username", st.builds(str.__add__, FIRST, OTHERS))
