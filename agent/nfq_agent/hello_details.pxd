"""What a ClientHello in the plain form says besides its name: the texts from which JA3 and JA4 are made, and ALPN. Pure.

`nfq_agent.protocols.tls` says the same in Python. Sources of the fingerprints are named there.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport qsort

from .tls_head cimport X_ALPN, X_ECH, X_GROUPS, X_POINT_FORMATS, X_SERVER_NAME, X_SIGNATURES, X_VERSIONS, two

cdef enum:
    # Bytes from which the details follow, at most (`told_by_hello`).
    TOLD = 1024
    # 16-bit numbers in them: half as many.
    MOST_NUMBERS = 512


cdef struct Line:
    # A number takes at most five digits and a comma for two bytes, a point format four characters for one.
    uint8_t text[4 * TOLD + 64]
    uint32_t size


cdef struct Details:
    # The version of the hello, and the highest offered.
    uint32_t legacy
    uint32_t version
    # Whether there is ECH's outer hello; how many ciphers and extensions there are; the letters of ALPN in JA4.
    bint ech
    uint32_t ciphers
    uint32_t extensions
    uint8_t letters[2]
    # Whether there is ALPN, and its names as JSON has them in a list.
    bint has_alpn
    Line alpn
    # What JA3 is the hash of; what the second and third part of JA4 are.
    Line ja3
    Line second
    Line third


cdef struct Numbers:
    uint16_t values[MOST_NUMBERS]
    uint32_t count


cdef inline bint is_grease(uint32_t number) noexcept nogil:
    """Whether a number has no meaning (RFC 8701)."""
    return number & 0x0F0F == 0x0A0A and number >> 8 == number & 0xFF


cdef inline void take_numbers(const uint8_t *data, size_t size, Numbers *found) noexcept nogil:
    """16-bit numbers, those without meaning left out. size: TOLD at most."""
    cdef size_t at
    found.count = 0
    for at in range(0, size & ~<size_t>1, 2):
        if not is_grease(two(data + at)):
            found.values[found.count] = two(data + at)
            found.count += 1


cdef inline void put(Line *line, uint8_t character) noexcept nogil:
    line.text[line.size] = character
    line.size += 1


cdef inline void put_decimal(Line *line, uint32_t number) noexcept nogil:
    cdef uint32_t power = 1
    while number // power >= 10:
        power *= 10
    while power:
        put(line, 0x30 + number // power % 10)
        power //= 10


cdef inline uint8_t digit(uint32_t number) noexcept nogil:
    """The hexadecimal digit of a number's last four bits."""
    number &= 15
    return 0x30 + number if number < 10 else 0x57 + number


cdef inline void put_decimals(Line *line, const Numbers *numbers) noexcept nogil:
    """A comma, and the numbers with dashes between."""
    cdef uint32_t place
    put(line, 0x2C)
    for place in range(numbers.count):
        if place:
            put(line, 0x2D)
        put_decimal(line, numbers.values[place])


cdef inline void put_hexadecimals(Line *line, const Numbers *numbers) noexcept nogil:
    """Four digits each, with commas between."""
    cdef uint32_t place, number
    for place in range(numbers.count):
        number = numbers.values[place]
        if place:
            put(line, 0x2C)
        put(line, digit(number >> 12))
        put(line, digit(number >> 8))
        put(line, digit(number >> 4))
        put(line, digit(number))


cdef inline int is_after(const void *one, const void *other) noexcept nogil:
    return <int>(<const uint16_t *>one)[0] - <int>(<const uint16_t *>other)[0]


cdef inline bint is_alphanumeric(uint8_t byte) noexcept nogil:
    return 0x30 <= byte <= 0x39 or 0x41 <= byte <= 0x5A or 0x61 <= byte <= 0x7A


cdef inline void take_letters(Details *found, const uint8_t *name, size_t size) noexcept nogil:
    """Those that JA4 has of the first name of ALPN."""
    if not size:
        return
    if is_alphanumeric(name[0]) and is_alphanumeric(name[size - 1]):
        found.letters[0], found.letters[1] = name[0], name[size - 1]
    else:
        found.letters[0], found.letters[1] = digit(name[0] >> 4), digit(name[size - 1])


cdef inline bint take_alpn(Details *found, const uint8_t *data, size_t size) noexcept nogil:
    """The names of a list of ALPN; False if one of them would have to be escaped."""
    cdef size_t at = 2, end
    found.has_alpn = True
    if size > 2:
        take_letters(found, data + 3, data[2])
    while at < size:
        if at > 2:
            put(&found.alpn, 0x2C)
        end = at + 1 + data[at]
        put(&found.alpn, 0x22)
        for at in range(at + 1, end):
            if data[at] < 0x20 or data[at] > 0x7E or data[at] == 0x22 or data[at] == 0x5C:
                return False
            put(&found.alpn, data[at])
        put(&found.alpn, 0x22)
        at = end
    return True


cdef inline uint32_t highest_of(const Numbers *versions, uint32_t otherwise) noexcept nogil:
    cdef uint32_t place, highest = 0
    for place in range(versions.count):
        if versions.values[place] > highest:
            highest = versions.values[place]
    return highest if versions.count else otherwise


cdef inline bint read_details(const uint8_t *told, size_t size, Details *found) noexcept nogil:
    """Read what tells a hello from others (`told_by_hello`); False where that is left to the parser in Python."""
    cdef Numbers ciphers, extensions, others, groups, signatures, versions
    cdef const uint8_t *formats = NULL
    cdef size_t at = 4 + two(told + 2), length, place, format_count = 0
    cdef uint32_t kind
    found.alpn.size = found.ja3.size = found.second.size = found.third.size = 0
    found.ech = found.has_alpn = False
    found.letters[0] = found.letters[1] = 0x30
    extensions.count = others.count = groups.count = signatures.count = versions.count = 0
    take_numbers(told + 4, at - 4, &ciphers)
    while at < size:
        kind, length = two(told + at), two(told + at + 2)
        at += 4
        if not is_grease(kind):
            extensions.values[extensions.count] = kind
            extensions.count += 1
            if kind != X_SERVER_NAME and kind != X_ALPN:
                others.values[others.count] = kind
                others.count += 1
        if kind == X_ECH:
            # In place of its length.
            found.ech = length
            length = 0
        elif kind == X_VERSIONS:
            take_numbers(told + at + 1, length - 1, &versions)
        elif kind == X_POINT_FORMATS and length:
            formats, format_count = told + at + 1, length - 1
        elif kind == X_GROUPS and length >= 2:
            take_numbers(told + at + 2, length - 2, &groups)
        elif kind == X_SIGNATURES and length >= 2:
            take_numbers(told + at + 2, length - 2, &signatures)
        elif kind == X_ALPN and not take_alpn(found, told + at, length):
            return False
        at += length
    found.legacy = two(told)
    found.version = highest_of(&versions, found.legacy)
    found.ciphers, found.extensions = ciphers.count, extensions.count
    put_decimal(&found.ja3, found.legacy)
    put_decimals(&found.ja3, &ciphers)
    put_decimals(&found.ja3, &extensions)
    put_decimals(&found.ja3, &groups)
    put(&found.ja3, 0x2C)
    for place in range(format_count):
        if place:
            put(&found.ja3, 0x2D)
        put_decimal(&found.ja3, formats[place])
    qsort(ciphers.values, ciphers.count, sizeof(uint16_t), is_after)
    put_hexadecimals(&found.second, &ciphers)
    qsort(others.values, others.count, sizeof(uint16_t), is_after)
    put_hexadecimals(&found.third, &others)
    if others.count and signatures.count:
        put(&found.third, 0x5F)
        put_hexadecimals(&found.third, &signatures)
    return True
