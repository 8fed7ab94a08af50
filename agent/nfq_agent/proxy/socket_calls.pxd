"""The calls to the kernel for plain_pairs.pyx, and addresses as the kernel has them. Source: the man pages of each."""

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>

    /* A socket's address, an IPv4 address in place of one that is mapped into IPv6 (RFC 4291, 2.5.5.2). mapped: that it was. */
    typedef struct {
        union {
            struct sockaddr any;
            struct sockaddr_in v4;
            struct sockaddr_in6 v6;
        };
        socklen_t size;
        int mapped;
    } Address;

    static void unmap(Address *address) {
        address->mapped = address->any.sa_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&address->v6.sin6_addr);
        if (address->mapped) {
            struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = address->v6.sin6_port};
            memcpy(&v4.sin_addr, address->v6.sin6_addr.s6_addr + 12, 4);
            address->v4 = v4;
        }
        address->size = address->any.sa_family == AF_INET ? sizeof address->v4 : sizeof address->v6;
    }

    static int accept_quietly(int listener, Address *peer) {
        peer->size = sizeof peer->v6;
        int fd = accept4(listener, &peer->any, &peer->size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0)
            unmap(peer);
        return fd;
    }

    static int own_address(int fd, Address *own) {
        own->size = sizeof own->v6;
        int failed = getsockname(fd, &own->any, &own->size);
        if (!failed)
            unmap(own);
        return failed;
    }

    /* SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, getorigdst() in net/netfilter/nf_conntrack_proto.c: both have this number. */
    static int original_address(int fd, const Address *peer, Address *original) {
        int v4 = peer->any.sa_family == AF_INET;
        memset(original, 0, sizeof *original);
        original->size = v4 ? sizeof original->v4 : sizeof original->v6;
        if (getsockopt(fd, v4 ? IPPROTO_IP : IPPROTO_IPV6, 80, &original->any, &original->size) != 0)
            return -1;
        original->any.sa_family = peer->any.sa_family;
        if (!v4) {
            original->v6.sin6_flowinfo = 0;
            /* The kernel gives the scope only of a socket that is bound to an interface; the peer's is the same link. */
            if (original->v6.sin6_scope_id == 0 && IN6_IS_ADDR_LINKLOCAL(&original->v6.sin6_addr))
                original->v6.sin6_scope_id = peer->v6.sin6_scope_id;
        }
        original->size = v4 ? sizeof original->v4 : sizeof original->v6;
        return 0;
    }

    /* A socket that connects, or -1; error: 0, or why it does not connect. */
    static int connecting(const Address *to, uint32_t mark, int *error) {
        int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        *error = 0;
        if (fd < 0 || (mark && setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof mark) != 0) ||
            (connect(fd, &to->any, to->size) != 0 && errno != EINPROGRESS))
            *error = errno;
        return fd;
    }

    static int family_of(const Address *address) { return address->any.sa_family; }
    static int is_mapped(const Address *address) { return address->mapped; }
    static int port_of(const Address *address) { return ntohs(address->v4.sin_port); }
    static uint32_t flow_of(const Address *address) { return ntohl(address->v6.sin6_flowinfo); }
    static uint32_t scope_of(const Address *address) { return address->v6.sin6_scope_id; }

    static void write_host(const Address *address, char *text) {
        const void *host = address->any.sa_family == AF_INET ? (const void *)&address->v4.sin_addr : &address->v6.sin6_addr;
        text[0] = 0;
        inet_ntop(address->any.sa_family, host, text, INET6_ADDRSTRLEN);
    }

    static void no_delay(int fd) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }

    static void reset_on_close(int fd) {
        struct linger abort = {.l_onoff = 1};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
    }

    /* The error that waits on a socket (socket(7), SO_ERROR); 0 if there is none. */
    static int error_of(int fd) {
        int number = 0;
        socklen_t size = sizeof number;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &size) == 0 ? number : errno;
    }

    static double monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    }
    """
    ctypedef struct Address:
        pass
    int family_of(const Address *) nogil
    bint is_mapped(const Address *) nogil
    int port_of(const Address *) nogil
    uint32_t flow_of(const Address *) nogil
    uint32_t scope_of(const Address *) nogil
    void write_host(const Address *, char *) nogil
    int accept_quietly(int listener, Address *) nogil
    int own_address(int, Address *) nogil
    int original_address(int, const Address *peer, Address *) nogil
    int connecting(const Address *, uint32_t mark, int *error) nogil
    void no_delay(int) nogil
    void reset_on_close(int) nogil
    int error_of(int) nogil
    double monotonic() nogil

cdef extern from "<sys/socket.h>" nogil:
    int AF_INET, AF_INET6, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    int shutdown(int, int)

cdef extern from "<unistd.h>" nogil:
    int close(int)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    enum: EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP
    unsigned int EPOLLET
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)


cdef inline tuple text_of(const Address *address):
    """An address as Python's socket module has it."""
    cdef char host[46]
    write_host(address, host)
    if family_of(address) == AF_INET:
        return host.decode(), port_of(address)
    return host.decode(), port_of(address), flow_of(address), scope_of(address)
