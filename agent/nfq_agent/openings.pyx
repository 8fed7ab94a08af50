# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What an element chain answers to the openings of flows, kept by what the answers follow from. Pure.

The chain is asked once for each name (see nfq_agent.foresight), and again when its place was taken by another name.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from .dns_head cimport name_of_message
from .flow_entry cimport O_DNS, O_HTTP, O_QUIET, O_SYN, O_TLS
from .flow_key cimport ends_of, mix
from .flow_record cimport M_HEAD, M_RECORD, M_SIZE, forget_record, keep_record
from .hello_details cimport TOLD, Details, Line, read_details
from .host_name cimport LONGEST_NAME
from .http_head cimport host_of_request, is_request
from .name_class cimport GROUPS, Names, class_of, drop_names, fill
from .plain_packet cimport K_ENDS, K_FORM, K_PORTS, KEY, Segment, is_wrong, ntohs, read_plain
from .silent_datagram cimport may_say
from .tls_head cimport name_of_hello, size_of_hello, told_by_hello

from nfq_agent.flow import NAME_FACTS, Asked
from nfq_agent.packet import FiveTuple

cdef enum:
    # Answers that are kept at most; each has one place.
    PLACES = 8192
    # Parts of the five-tuple that answers follow from.
    R_SRC = 1
    R_SPORT = 2
    R_DST = 4
    R_DPORT = 8
    # Form, source, its port, destination, its port, kind.
    FIXED = 38
    # In the kind: the name is told by the patterns that it fits.
    BY_CLASS = 128
    # Places of answers that follow from more than a hello's name, since programs that change it fill them.
    TOLD_PLACES = 1024

# What the chain is asked about.
cdef dict ASKED = {
    O_SYN: Asked.SYN, O_HTTP: Asked.HTTP, O_TLS: Asked.TLS, BEGUN: Asked.TLS, O_DNS: Asked.DNS, O_DNS | AGAIN: Asked.DNS_AGAIN,
    O_QUIET: Asked.QUIET, O_QUIET | AGAIN: Asked.GAVE_UP,
}
# As nfq_agent.protocols.tls has them.
cdef dict VERSIONS = {0x0300: "ssl3", 0x0301: "1.0", 0x0302: "1.1", 0x0303: "1.2", 0x0304: "1.3"}
cdef dict JA4_VERSIONS = {0x0300: "s3", 0x0301: "10", 0x0302: "11", 0x0303: "12", 0x0304: "13"}
READS = {"src": R_SRC, "sport": R_SPORT, "dst": R_DST, "dport": R_DPORT}


def is_plain_request(const uint8_t[::1] data not None, const uint8_t[::1] host not None):
    """Whether bytes are one HTTP request in the plain form, for this host (see http_head.pxd)."""
    if not data.shape[0] or not host.shape[0]:
        return False
    return is_request(&data[0], data.shape[0], &host[0], host.shape[0])


def name_in_opening(const uint8_t[::1] data not None):
    """The protocol and the name of a client's first bytes, where they are in the plain form (see http_head.pxd, tls_head.pxd)."""
    cdef uint8_t name[LONGEST_NAME]
    cdef size_t size = 0
    if not data.shape[0]:
        return None
    if name_of_hello(&data[0], data.shape[0], name, &size):
        protocol = "tls"
    elif host_of_request(&data[0], data.shape[0], name, &size):
        protocol = "http"
    else:
        return None
    return protocol, (<const char *>name)[:size].decode("ascii")


def told_in_hello(const uint8_t[::1] data not None):
    """What tells ClientHellos in the plain form apart, besides the name (see tls_head.pxd); None for others and for long ones."""
    cdef uint8_t name[LONGEST_NAME]
    cdef uint8_t told[TOLD]
    cdef size_t size = 0
    if not data.shape[0] or not name_of_hello(&data[0], data.shape[0], name, &size):
        return None
    size = told_by_hello(&data[0], told, TOLD)
    return (<const char *>told)[:size] if size else None


cdef inline str short_hash(const Line *line):
    """Twelve digits; zeros of nothing."""
    from hashlib import sha256

    return sha256((<const char *>line.text)[:line.size]).hexdigest()[:12] if line.size else "0" * 12


cdef bytes details_told(const uint8_t *told, size_t size):
    """What a hello says besides its name (`nfq_agent.unshown.details_of`), by what tells it apart; None where that is left to Python."""
    cdef Details found
    # Not at the top: it brings a library of 3 MB, which an agent without elements does not need.
    from hashlib import md5

    if not read_details(told, size, &found):
        return None
    version = VERSIONS.get(found.version) or f"{found.version:#06x}"
    ech = "true" if found.ech else "false"
    alpn = f',"tls_alpn":[{(<const char *>found.alpn.text)[:found.alpn.size].decode("ascii")}]' if found.has_alpn else ""
    ja3 = md5((<const char *>found.ja3.text)[:found.ja3.size], usedforsecurity=False).hexdigest()
    letters = (<const char *>found.letters)[:2].decode("ascii")
    # A hello in the plain form has a name.
    first = f"t{JA4_VERSIONS.get(found.version, '00')}d{min(found.ciphers, 99):02}{min(found.extensions, 99):02}{letters}"
    ja4 = f"{first}_{short_hash(&found.second)}_{short_hash(&found.third)}"
    return f'{{"tls_version":"{version}","ech":{ech}{alpn},"ja3":"{ja3}","ja4":"{ja4}"}}'.encode()


def details_in_hello(const uint8_t[::1] data not None):
    """What a ClientHello in the plain form says besides its name (see hello_details.pxd); None where that is left to Python."""
    told = told_in_hello(data)
    return None if told is None else details_told(told, len(told))


cdef inline uint8_t *copied(bytes text, uint32_t *size) except? NULL:
    """A copy of some text. size: takes its length."""
    cdef const char *source = text
    cdef uint8_t *found = <uint8_t *>malloc(len(text) or 1)
    if found == NULL:
        raise MemoryError
    size[0] = len(text)
    memcpy(found, source, len(text))
    return found


cdef inline void drop_answer(Answer *answer) noexcept nogil:
    free(answer.key)
    free(answer.text)
    free(answer.details)
    memset(answer, 0, sizeof(Answer))


def name_in_message(const uint8_t[::1] data not None):
    """The name in a datagram of DNS, where it is in the plain form (see dns_head.pxd); else None."""
    cdef uint8_t name[LONGEST_NAME]
    cdef size_t size = 0
    if not data.shape[0] or not name_of_message(&data[0], data.shape[0], name, &size):
        return None
    return (<const char *>name)[:size].decode("ascii")


def is_silent(const uint8_t[::1] data not None):
    """Whether a datagram says nothing for certain (see silent_datagram.pxd)."""
    return bool(data.shape[0]) and not may_say(&data[0], data.shape[0])


def groups_that_fit(groups, str name not None):
    """The groups of patterns of which one fits a name, a bit each (see name_class.pxd)."""
    cdef Names names
    cdef bytes text = name.encode()
    memset(&names, 0, sizeof(Names))
    try:
        fill(&names, groups, 1)
        return class_of(&names, text, len(text))
    finally:
        drop_names(&names)


def is_wrong_plain(bytes packet not None):
    """Whether a checksum of a whole packet in the plain form is wrong; None of another (see nfq_agent.checksum.is_wrong)."""
    cdef uint8_t key[KEY]
    cdef Segment segment
    cdef const uint8_t *data = packet
    cdef size_t size = len(packet)
    if size > 0xFFFF or not read_plain(data, size, size, key, &segment):
        return None
    return is_wrong(data, size, &segment)


cdef class Openings:
    """The answers. foresee: takes what is Asked, a five-tuple and a name; returns the facts for the memory and the places of what
    decided in `decisions`, or None if the chain does not accept. reads: the parts of the five-tuple that it reads. apart: up to
    four ports of DNS, where TCP is not asked about. memory: where accepted connections are kept (nfq_agent.flow_memory), or
    None. decisions: where decisions are counted (nfq_agent.decisions), or None. names: the patterns from which the answers follow, in
    groups (nfq_agent.name_class), None where they follow from the whole name. tell: what else they follow from, of a ClientHello,
    where compiled code does not find it; it is given to `foresee` as well. None where they do not. questions: whether messages of DNS are answered. patience: how many
    datagrams, of how many bytes, may say nothing while the answer is open; 0 where they are not answered.
    """

    def __cinit__(
        self, foresee, reads, apart, memory, decisions=None, names=None, tell=None, bint questions=False, patience=(0, 0)
    ):
        cdef uint8_t[::1] room
        cdef uint64_t[::1] numbers
        self.answers = <Answer *>calloc(PLACES, sizeof(Answer))
        if self.answers == NULL:
            raise MemoryError
        self.seed = <uint64_t>hash(b"nfq-agent openings") | 1
        for part in reads:
            self.reads |= <uint32_t>READS[part]
        if len(apart) > 4:
            raise ValueError("at most four ports stand apart")
        for place, port in enumerate(apart):
            self.apart[place] = port
        self.foresee = foresee
        self.questions = questions
        self.within, self.within_bytes = patience
        self.tell = tell
        self.tells = tell is not None
        if memory is not None:
            room = memory.room
            if room.shape[0] != M_SIZE:
                raise ValueError("not a flow memory")
            self.memory = &room[0]
            # The memory stays as long as this does.
            self.held = memory
        if decisions is not None and len(decisions.room):
            numbers = decisions.room
            self.counts = &numbers[0]
            self.counted = decisions
        if names is not None and len(names) <= GROUPS:
            fill(&self.names, names, self.seed)
            self.by_class = True

    def __dealloc__(self):
        cdef uint32_t place
        if self.answers != NULL:
            for place in range(PLACES):
                drop_answer(&self.answers[place])
        free(self.answers)
        drop_names(&self.names)

    cdef bint is_apart(self, const uint8_t *key) noexcept nogil:
        """Whether a port of the flow stands apart."""
        cdef const uint16_t *ports = <const uint16_t *>(key + K_PORTS)
        cdef uint32_t number, low = ntohs(ports[0]), high = ntohs(ports[1])
        for number in range(4):
            if self.apart[number] and (self.apart[number] == low or self.apart[number] == high):
                return True
        return False

    cdef bint accepts(
        self, const uint8_t *key, bint down, uint8_t kind, const uint8_t *name, size_t length, const uint8_t *hello
    ) noexcept nogil:
        """Whether the chain accepts an opening. key: of the flow. down: whether the client's packets go down (see Segment).

        kind: O_SYN, O_HTTP, O_TLS or BEGUN; O_DNS or O_QUIET, also with AGAIN. name: of so many bytes, 0 of a SYN and where it has begun.
        hello: in the plain form, NULL of others.
        """
        cdef uint8_t wanted[FIXED + LONGEST_NAME + TOLD + 8]
        cdef uint32_t client = 16 if down else 0, size, at, told, places = PLACES
        cdef uint64_t fits
        cdef uint64_t hashed = self.seed, word
        cdef Answer *answer
        memset(wanted, 0, FIXED)
        wanted[0] = key[K_FORM]
        if self.reads & R_SRC:
            memcpy(wanted + 1, key + K_ENDS + client, 16)
        if self.reads & R_SPORT:
            memcpy(wanted + 17, key + K_PORTS + client // 8, 2)
        if self.reads & R_DST:
            memcpy(wanted + 19, key + K_ENDS + 16 - client, 16)
        if self.reads & R_DPORT:
            memcpy(wanted + 35, key + K_PORTS + 2 - client // 8, 2)
        wanted[37] = kind
        size = FIXED + length
        if length and self.by_class:
            wanted[37] |= BY_CLASS
            fits = class_of(&self.names, name, length)
            memcpy(wanted + FIXED, &fits, 8)
            size = FIXED + 8
        elif length:
            memcpy(wanted + FIXED, name, length)
        if hello != NULL and self.tells:
            told = told_by_hello(hello, wanted + size, TOLD)
            if told == 0:
                return False
            size += told
            places = TOLD_PLACES
        memset(wanted + size, 0, 8)
        for at in range(0, size, 8):
            memcpy(&word, wanted + at, 8)
            hashed = mix(hashed ^ word, 0x9E3779B97F4A7C15ULL ^ (self.seed << 1))
        answer = &self.answers[(hashed ^ hashed >> 32) & (places - 1)]
        if answer.hashed != hashed or answer.size != size or answer.key == NULL or memcmp(answer.key, wanted, size):
            drop_answer(answer)
            if not self._ask(key, down, kind, name, length, hello, answer):
                return False
            answer.key = <uint8_t *>malloc(size)
            if answer.key == NULL:
                return False
            memcpy(answer.key, wanted, size)
            answer.size = size
            answer.hashed = hashed
        self.latest = answer[0]
        if self.counts != NULL:
            for at in range(answer.decided):
                self.counts[answer.places[at]] += 1
        return answer.accepts

    cdef bint _ask(
        self, const uint8_t *key, bint down, uint8_t kind, const uint8_t *name, size_t length, const uint8_t *hello, Answer *answer
    ) noexcept with gil:
        """Ask the chain; False if it fails, which its elements do again when they are shown the packet."""
        cdef tuple told = ()
        cdef uint8_t apart[TOLD]
        cdef size_t size
        try:
            asked = ASKED[kind]
            text_of_name = (<const char *>name)[:length].decode("ascii") if length else ""
            if hello != NULL and self.tells:
                size = told_by_hello(hello, apart, TOLD)
                details = details_told(apart, size) if size else None
                told = (self.tell((<const char *>hello)[:size_of_hello(hello, 10)]) if details is None else details,)
                answer.details = copied(told[0], &answer.details_size)
            found = self.foresee(asked, FiveTuple(*ends_of(key, down)), text_of_name, *told)
            if found is not None:
                facts, places = found
                if self.counts != NULL:
                    for place in places[:MOST_DECIDED]:
                        answer.places[answer.decided] = place
                        answer.decided += 1
                answer.accepts = True
                if facts:
                    if length and self.by_class:
                        # Behind the name of its fact; where the facts do not have it, they have nothing of the name.
                        fact = b'"%s":"' % NAME_FACTS[asked].encode()
                        answer.name_at = facts.find(fact) + len(fact) if fact in facts else 0
                        answer.name_size = length
                    answer.text = copied(facts, &answer.text_size)
        except Exception:
            return False
        return True

    cdef void forget(self, const uint8_t *key) noexcept nogil:
        """A connection begins: the memory forgets what it has of the one before."""
        if self.memory != NULL:
            forget_record(self.memory, key)

    cdef void keep(
        self, const uint8_t *key, bint down, bint answered, uint32_t tick, uint8_t kind, const uint8_t *name, size_t length,
        const uint8_t *hello,
    ) noexcept nogil:
        """Put the connection that was accepted last, for this name, into the memory. tick: sixteenths of a second."""
        cdef const Answer *answer = &self.latest
        cdef uint8_t text[M_RECORD]
        cdef uint32_t behind, size
        if self.memory == NULL or answer.text == NULL:
            return
        if answer.name_size == 0:
            keep_record(self.memory, key, down, answer.text, answer.text_size, answered, tick // 16)
            return
        behind = answer.name_at + answer.name_size
        size = answer.text_size - answer.name_size + length
        if answer.name_at == 0 or size > M_RECORD - M_HEAD:
            self._keep_long(key, down, answered, tick, kind, name, length, hello)
            return
        memcpy(text, answer.text, answer.name_at)
        memcpy(text + answer.name_at, name, length)
        memcpy(text + answer.name_at + length, answer.text + behind, answer.text_size - behind)
        keep_record(self.memory, key, down, text, size, answered, tick // 16)

    cdef void _keep_long(
        self, const uint8_t *key, bint down, bint answered, uint32_t tick, uint8_t kind, const uint8_t *name, size_t length,
        const uint8_t *hello,
    ) noexcept with gil:
        """Facts that have no room with this name: the chain says which are kept."""
        cdef Answer answer
        memset(&answer, 0, sizeof(Answer))
        if self._ask(key, down, kind, name, length, hello, &answer) and answer.accepts:
            keep_record(self.memory, key, down, answer.text, answer.text_size, answered, tick // 16)
        drop_answer(&answer)
