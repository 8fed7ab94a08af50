// The load of the benchmarks, and what answers it. Every run is bounded in time, or in time and count.
//
//   load flood ADDRESS PORT FLOWS SECONDS        datagrams of 64 bytes as fast as they go; prints how many
//   load burst ADDRESS PORT COUNT BURST RATE     datagrams of 64 bytes in bursts; prints how many the kernel took
//   load serve datagrams|answers|echo|close PORT   a server that sends back (answers: as DNS answers), or closes at once; ends by a signal
//   load ask tcp|udp ADDRESS PORT SECONDS        64 bytes there and back on one connection; prints how many a second, median in us
//   load fresh dns|plain ADDRESS PORT AT_ONCE SECONDS   a new UDP flow for each datagram, a new name in each DNS query; prints
//                                                how many were answered a second, and how many of all were not within 0.5 s
//   load replay FILE QUEUES MOST                   frames of a file (2 bytes of length, then the frame) out of eth0, no more than MOST
//                                                of them in the queues of the file QUEUES (nfnetlink_queue of another
//                                                namespace) at once; prints the seconds until all are answered
//   load connect ADDRESS PORT AT_ONCE SECONDS    connections that the server closes; prints how many a second, and failures
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netpacket/packet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 64, BATCH = 32, MOST_FLOWS = 10000, MOST_AT_ONCE = 1024, CHUNK = 65536, EVENTS = 256 };

static char buffer[CHUNK];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static struct sockaddr_in to(const char *address, int port)
{
    struct sockaddr_in end = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &end.sin_addr) != 1)
        die(address);
    return end;
}

static void set(int fd, int level, int name, int value)
{
    if (setsockopt(fd, level, name, &value, sizeof value) != 0)
        die("setsockopt");
}

static int datagrams(const char *address, int port)
{
    struct sockaddr_in end = to(address, port);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    // What waits in a queue is charged to its sender: it must never be what holds it back.
    set(fd, SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20);
    if (connect(fd, (struct sockaddr *)&end, sizeof end) != 0)
        die("connect");
    return fd;
}

// Takes them, so that the kernel sends no ICMP error; never read. An address elsewhere has one there.
static void receiver(const char *address, int port)
{
    struct sockaddr_in end = to(address, port);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    set(fd, SOL_SOCKET, SO_REUSEPORT, 1);
    if (bind(fd, (struct sockaddr *)&end, sizeof end) != 0 && errno != EADDRNOTAVAIL)
        die("bind");
}

static struct mmsghdr *messages(int count)
{
    static struct iovec vector = {buffer, SMALL};
    struct mmsghdr *all = calloc(count, sizeof *all);
    for (int i = 0; i < count; i++) {
        all[i].msg_hdr.msg_iov = &vector;
        all[i].msg_hdr.msg_iovlen = 1;
    }
    return all;
}

static void flood(const char *address, int port, int flows, double seconds)
{
    static int fds[MOST_FLOWS];
    struct rlimit limit = {MOST_FLOWS + 64, MOST_FLOWS + 64};
    struct mmsghdr *batch = messages(BATCH);
    long sent = 0;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        die("setrlimit");
    receiver(address, port);
    for (int i = 0; i < flows; i++)
        fds[i] = datagrams(address, port);
    double end = now() + seconds;
    while (now() < end)
        for (int i = 0; i < flows; i++) {
            int count = sendmmsg(fds[i], batch, BATCH, 0);
            // EPERM: dropped at a full queue. It ends the batch, and counts as sent.
            sent += count > 0 ? count : 1;
        }
    printf("%ld\n", sent);
}

static void burst(const char *address, int port, long count, int size, double rate)
{
    int fd = datagrams(address, port);
    struct mmsghdr *batch = messages(size);
    long sent = 0;
    receiver(address, port);
    double begin = now();
    while (sent < count) {
        int left = size;
        while (left > 0) {
            int done = sendmmsg(fd, batch, left, 0);
            if (done < 0 && errno != EPERM)
                die("sendmmsg");
            done = done > 0 ? done : 1;
            left -= done;
            sent += done;
        }
        double ahead = begin + sent / rate - now();
        if (ahead > 0)
            usleep(ahead * 1e6);
    }
    printf("%ld\n", sent);
}

static int stream(const char *address, int port)
{
    struct sockaddr_in end = to(address, port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    if (connect(fd, (struct sockaddr *)&end, sizeof end) != 0)
        die("connect");
    return fd;
}

static void serve_datagrams(int port, int answers)
{
    struct sockaddr_in end = to("0.0.0.0", port);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(fd, (struct sockaddr *)&end, sizeof end) != 0)
        die("bind");
    puts("ready");
    fflush(stdout);
    for (;;) {
        socklen_t size = sizeof end;
        ssize_t count = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&end, &size);
        // QR (RFC 1035 4.1.1).
        if (count > 2 && answers)
            buffer[2] |= 0x80;
        if (count > 0)
            sendto(fd, buffer, count, 0, (struct sockaddr *)&end, size);
    }
}

static void serve(const char *kind, int port)
{
    if (kind[0] == 'd' || kind[0] == 'a')
        serve_datagrams(port, kind[0] == 'a');
    struct sockaddr_in here = to("0.0.0.0", port);
    struct epoll_event events[EVENTS], event = {.events = EPOLLIN};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), loop = epoll_create1(0);
    set(listener, SOL_SOCKET, SO_REUSEADDR, 1);
    set(listener, IPPROTO_TCP, TCP_NODELAY, 1);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) != 0 || listen(listener, 4096) != 0)
        die("listen");
    event.data.fd = listener;
    epoll_ctl(loop, EPOLL_CTL_ADD, listener, &event);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(loop, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (kind[0] == 'c') {
                        close(fd);
                        continue;
                    }
                    event.data.fd = fd;
                    epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            ssize_t size = recv(fd, buffer, sizeof buffer, 0);
            if (size > 0)
                send(fd, buffer, size, MSG_NOSIGNAL);
            if (size == 0 || (size < 0 && errno != EAGAIN))
                close(fd);
        }
    }
}

static int by_size(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static void ask(int fd, double seconds)
{
    enum { KEPT = 1 << 20 };
    static float took[KEPT];
    long count = 0;
    double begin = now(), last = begin;
    while (last < begin + seconds) {
        if (send(fd, buffer, SMALL, MSG_NOSIGNAL) != SMALL || recv(fd, buffer, SMALL, MSG_WAITALL) != SMALL)
            die("exchange");
        double then = now();
        took[count % KEPT] = then - last;
        last = then;
        count++;
    }
    size_t kept = count < KEPT ? count : KEPT;
    qsort(took, kept, sizeof *took, by_size);
    printf("%.1f %.2f\n", count / (last - begin), took[kept / 2] * 1e6);
}

static void call(int loop, const struct sockaddr_in *end)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
    if (fd < 0 || (connect(fd, (const struct sockaddr *)end, sizeof *end) != 0 && errno != EINPROGRESS))
        die("connect");
    epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event);
}

static void connections(const char *address, int port, int at_once, double seconds)
{
    struct sockaddr_in end = to(address, port);
    struct epoll_event events[EVENTS];
    int loop = epoll_create1(0);
    long done = 0, failed = 0;
    for (int i = 0; i < at_once; i++)
        call(loop, &end);
    double begin = now(), last;
    while ((last = now()) < begin + seconds) {
        int count = epoll_wait(loop, events, EVENTS, 100);
        for (int i = 0; i < count; i++) {
            if (recv(events[i].data.fd, buffer, SMALL, 0) == 0)
                done++;
            else
                failed++;
            close(events[i].data.fd);
            call(loop, &end);
        }
    }
    printf("%.1f %ld\n", done / (last - begin), failed);
}

// A query for host-NUMBER.good.test (RFC 1035 4.1), or so many bytes that say nothing.
static int question(char *bytes, int plain, long number)
{
    static const char head[12] = {0, 7, 1, 0, 0, 1}, tail[] = "\4good\4test\0\0\1\0\1";
    char label[32];
    if (plain) {
        memset(bytes, 'x', SMALL);
        return SMALL;
    }
    memcpy(bytes, head, sizeof head);
    int length = snprintf(label, sizeof label, "host-%ld", number);
    bytes[12] = length;
    memcpy(bytes + 13, label, length);
    memcpy(bytes + 13 + length, tail, sizeof tail - 1);
    return 13 + length + sizeof tail - 1;
}

static void fresh(int plain, const char *address, int port, int at_once, double seconds)
{
    struct sockaddr_in end = to(address, port);
    struct epoll_event events[EVENTS], event = {.events = EPOLLIN};
    int fds[MOST_AT_ONCE], loop = epoll_create1(0);
    double since[MOST_AT_ONCE] = {0}, begin = now(), last = begin;
    char bytes[128];
    long sent = 0, answered = 0, lost = 0;
    for (int i = 0; i < at_once; i++)
        fds[i] = -1;
    while (last < begin + seconds) {
        for (int i = 0; i < at_once; i++) {
            if (fds[i] >= 0 && last > since[i] + 0.5) {
                close(fds[i]);
                fds[i] = -1;
                lost++;
            }
            if (fds[i] >= 0)
                continue;
            fds[i] = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
            if (fds[i] < 0 || connect(fds[i], (struct sockaddr *)&end, sizeof end) != 0)
                die("connect");
            event.data.u32 = i;
            epoll_ctl(loop, EPOLL_CTL_ADD, fds[i], &event);
            // Dropped at once (EPERM) counts as sent: no answer comes.
            send(fds[i], bytes, question(bytes, plain, sent++), 0);
            since[i] = last;
        }
        int count = epoll_wait(loop, events, EVENTS, 10);
        for (int i = 0; i < count; i++) {
            int *fd = &fds[events[i].data.u32];
            if (recv(*fd, buffer, sizeof buffer, 0) > 0)
                answered++;
            else
                lost++;
            close(*fd);
            *fd = -1;
        }
        last = now();
    }
    printf("%.1f %.6f\n", answered / (last - begin), (double)lost / sent);
}

// Packets that wait in the queues, by /proc/net/netfilter/nfnetlink_queue: the third field of each line.
static long waiting(const char *path)
{
    FILE *file = fopen(path, "r");
    long sum = 0, count;
    if (file == NULL)
        die(path);
    while (fscanf(file, "%*s %*s %ld %*[^\n]", &count) == 1)
        sum += count;
    fclose(file);
    return sum;
}

static void replay(const char *path, const char *queues, long most)
{
    enum { LOOK = 128 };
    struct stat about;
    int file = open(path, O_RDONLY), fd = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll end = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex("eth0")};
    if (file < 0 || fstat(file, &about) != 0 || fd < 0 || bind(fd, (struct sockaddr *)&end, sizeof end) != 0)
        die(path);
    const unsigned char *at = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    if (at == MAP_FAILED)
        die("mmap");
    const unsigned char *limit = at + about.st_size;
    double begin = now();
    for (long sent = 0; at + 2 <= limit; sent++) {
        int size = at[0] << 8 | at[1];
        if (send(fd, at + 2, size, 0) != size)
            die("send");
        at += 2 + size;
        if (sent % LOOK == 0)
            while (waiting(queues) + LOOK > most)
                usleep(50);
    }
    while (waiting(queues) > 0 && now() < begin + 50)
        usleep(50);
    printf("%.6f\n", now() - begin);
}

int main(int argc, char **argv)
{
    const char *verb = argc > 3 ? argv[1] : "";
    if (!strcmp(verb, "serve") && argc == 4)
        serve(argv[2], atoi(argv[3]));
    else if (!strcmp(verb, "flood") && argc == 6 && atoi(argv[4]) <= MOST_FLOWS)
        flood(argv[2], atoi(argv[3]), atoi(argv[4]), atof(argv[5]));
    else if (!strcmp(verb, "burst") && argc == 7)
        burst(argv[2], atoi(argv[3]), atol(argv[4]), atoi(argv[5]), atof(argv[6]));
    else if (!strcmp(verb, "ask") && argc == 6)
        ask((argv[2][0] == 't' ? stream : datagrams)(argv[3], atoi(argv[4])), atof(argv[5]));
    else if (!strcmp(verb, "fresh") && argc == 7 && atoi(argv[5]) <= MOST_AT_ONCE)
        fresh(argv[2][0] == 'p', argv[3], atoi(argv[4]), atoi(argv[5]), atof(argv[6]));
    else if (!strcmp(verb, "replay") && argc == 5)
        replay(argv[2], argv[3], atol(argv[4]));
    else if (!strcmp(verb, "connect") && argc == 6 && atoi(argv[4]) <= MOST_AT_ONCE)
        connections(argv[2], atoi(argv[3]), atoi(argv[4]), atof(argv[5]));
    else {
        fprintf(stderr, "load: see the head of load.c\n");
        return 2;
    }
    return 0;
}
