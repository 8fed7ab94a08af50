"""What has passed of a flow, as the table counts it. Values only."""

from libc.stdint cimport uint8_t

from .flow_entry cimport Entry, bytes_of
from .flow_key cimport key_of
from .plain_packet cimport KEY


cdef inline tuple account_of(const Entry *entry):
    """The values of an Account. entry: one that has a Flow."""
    cdef uint8_t key[KEY]
    flow = <object>entry.flow
    cdef bint down = key_of(flow.origin, key) == <bint>flow.origin_is_client
    return entry.counted[down], bytes_of(entry, down), entry.counted[not down], bytes_of(entry, not down), entry.last / 16.0
