"""Suricata of Debian 13 as a peer: it prevents intrusions on the same queue, with the same names, in a root of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bed import HERE, MAX_LEN, QUEUE, Bed, BenchError

sys.path.insert(0, str(HERE.parent))

from booted.roots import RELEASES, neighbours_root  # found by the line above

_WITHIN: Final = 60.0
# It asks the kernel for four times as many packets as it handles at a time (source-nfq.c).
_PENDING: Final = MAX_LEN // 4
_SETTINGS: Final = f"""%YAML 1.1
---
max-pending-packets: {_PENDING}
default-rule-path: /mnt
rule-files: [names.rules]
default-log-dir: /tmp
classification-file: /etc/suricata/classification.config
reference-config-file: /etc/suricata/reference.config
nfq: {{mode: accept, batchcount: BATCH, fail-open: no}}
outputs: []
logging: {{default-log-level: error, outputs: [{{console: {{enabled: yes}}}}]}}
unix-command: {{enabled: no}}
app-layer:
  protocols:
    tls: {{enabled: yes, detection-ports: {{dp: "443, 8443"}}}}
    http: {{enabled: yes}}
    dns: {{tcp: {{enabled: yes, detection-ports: {{dp: 53}}}}, udp: {{enabled: yes, detection-ports: {{dp: 53}}}}}}
stream: {{memcap: 256mb, inline: auto, reassembly: {{memcap: 512mb}}}}
flow: {{memcap: 256mb, hash-size: 65536, prealloc: 10000}}
detect: {{profile: medium}}
threading: {{set-cpu-affinity: no, worker-cpu-affinity: {{}}}}
"""


def rules(names: Sequence[str], closed: bool) -> str:
    """Rules that pass messages for these names; closed: and drop those for all others. A name of `*.` passes what is below it."""
    lines = []
    keywords = (("http", "http.host"), ("tls", "tls.sni"), ("dns", "dns.query"))
    for number, name in enumerate(names):
        for place, (protocol, keyword) in enumerate(keywords):
            text, anchor = (name[1:], "") if name.startswith("*.") else (name, "startswith; ")
            sid = 1 + 3 * number + place
            lines.append(f'pass {protocol} any any -> any any ({keyword}; content:"{text}"; {anchor}endswith; sid:{sid};)')
    if closed:
        lines += [f"drop {protocol} any any -> any any (sid:{9001 + place};)" for place, (protocol, _) in enumerate(keywords)]
    return "\n".join(lines) + "\n"


def serve(bed: Bed, names: Sequence[str], closed: bool, batch: int = 20, core: int = 1) -> int:
    """Start it; it serves when its queue is bound. batch: verdicts that it gives by one message. Its pid. Raises BenchError."""
    root = neighbours_root(RELEASES[1], "suricata")
    (bed.folder / "names.rules").write_text(rules(names, closed))
    (bed.folder / "suricata.yaml").write_text(_SETTINGS.replace("BATCH", str(batch)))
    # The mounts are the namespace's own and end with it.
    bed.here.shell(f"mount --bind {bed.folder} {root}/mnt && mount -t proc proc {root}/proc && mount -t tmpfs tmpfs {root}/run")
    log = bed.folder / "suricata.log"
    with log.open("wb") as said:
        process = bed.here.start(
            "taskset", "-c", str(core), "chroot", str(root), "suricata", "-c", "/mnt/suricata.yaml", "-q", str(QUEUE),
            "--runmode", "workers", stdout=said, stderr=said,
        )  # fmt: skip
    end = time.monotonic() + _WITHIN
    while not bed.queues():
        if process.poll() is not None or time.monotonic() > end:
            raise BenchError(f"Suricata does not serve:\n{_last(log)}")
        time.sleep(0.05)
    return int(process.pid)


def _last(path: Path) -> str:
    return path.read_text()[-2000:]
