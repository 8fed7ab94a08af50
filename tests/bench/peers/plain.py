"""NetfilterQueue as its documentation shows it: a callback that accepts. argv: number, copy range, length of the queue."""

from __future__ import annotations

import sys
import warnings

from netfilterqueue import NetfilterQueue

number, copy_range, max_len = (int(word) for word in sys.argv[1:])
queue = NetfilterQueue()
warnings.simplefilter("ignore", RuntimeWarning)
queue.bind(number, lambda packet: packet.accept(), max_len=max_len, range=copy_range, sock_len=8 << 20)
print("ready", flush=True)
queue.run()
