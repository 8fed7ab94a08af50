"""The spellings of HTTP through the proxy and its element `http-host`."""

from __future__ import annotations

from functools import partial

from evasion_config import GATE, NGINX
from evasion_http import SPELLINGS, after, alone
from evasion_line import Line
from evasion_servers import GATE_PYTHON, PYTHON

# The same servers behind the proxy.
_PORTS = {NGINX: GATE, PYTHON: GATE_PYTHON}

LINES = (
    *(
        Line(f"gate-{key}", f"The proxy's `http-host`: {text}", partial(alone, template, port=_PORTS[port]))
        for key, (text, template, port) in SPELLINGS.items()
    ),
    Line(
        "gate-second", "The proxy's `http-host`: a second request on the connection",
        partial(after, "GET / HTTP/1.1\r\nHost: <N>\r\n\r\n", port=GATE), twin=True,
        limit="the gate decides once for a connection, by its first request; a policy judges each",
    ),
)  # fmt: skip
