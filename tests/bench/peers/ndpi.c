// A loop on libnetfilter_queue that has libndpi find the name of each flow, in a table of its own, and accepts every packet.
//
//   queue-ndpi NUMBER MAX_LEN
//
// IPv4 with plain headers alone: what the benchmark sends.
#include <arpa/inet.h>
#include <errno.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <ndpi/ndpi_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BUFFER = 65536 + 4096, RECEIVE_BUFFER = 8 << 20, BUCKETS = 1 << 20, TURN = 256, ENOUGH = 8 };

struct end {
    uint32_t address;
    uint16_t port;
} __attribute__((packed));

struct entry {
    struct entry *next;
    struct end low, high;
    uint8_t protocol, packets, done;
    struct ndpi_flow_struct *flow;
};

static struct ndpi_detection_module_struct *module;
static struct entry *table[BUCKETS];
static int unanswered;
static uint32_t last;
static uint64_t clock_ms;

static void need(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static struct entry *find(const uint8_t *packet, size_t head)
{
    struct end from, to;
    memcpy(&from.address, packet + 12, 4);
    memcpy(&to.address, packet + 16, 4);
    memcpy(&from.port, packet + head, 2);
    memcpy(&to.port, packet + head + 2, 2);
    int swapped = memcmp(&from, &to, sizeof from) > 0;
    struct end low = swapped ? to : from, high = swapped ? from : to;
    uint32_t hash = (low.address ^ high.address * 31 ^ low.port << 16 ^ high.port) * 2654435769u;
    struct entry **place = &table[hash % BUCKETS];
    for (struct entry *each = *place; each != NULL; each = each->next)
        if (!memcmp(&each->low, &low, sizeof low) && !memcmp(&each->high, &high, sizeof high) && each->protocol == packet[9])
            return each;
    struct entry *made = calloc(1, sizeof *made);
    need(made != NULL, "calloc");
    *made = (struct entry){.next = *place, .low = low, .high = high, .protocol = packet[9]};
    made->flow = ndpi_flow_malloc(SIZEOF_FLOW_STRUCT);
    need(made->flow != NULL, "ndpi_flow_malloc");
    memset(made->flow, 0, SIZEOF_FLOW_STRUCT);
    return *place = made;
}

static void look(uint8_t *packet, int size)
{
    if (size < 28 || packet[0] >> 4 != 4)
        return;
    struct entry *entry = find(packet, (packet[0] & 15) * 4);
    if (entry->done)
        return;
    ndpi_detection_process_packet(module, entry->flow, packet, size, ++clock_ms);
    entry->done = entry->flow->host_server_name[0] != '\0' || ++entry->packets >= ENOUGH;
    if (entry->done) {
        ndpi_flow_free(entry->flow);
        entry->flow = NULL;
    }
}

static int take(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *packet, void *data)
{
    unsigned char *bytes;
    (void)queue;
    (void)message;
    (void)data;
    last = ntohl(nfq_get_msg_packet_hdr(packet)->packet_id);
    unanswered++;
    int size = nfq_get_payload(packet, &bytes);
    if (size > 0)
        look(bytes, size);
    return 0;
}

int main(int argc, char **argv)
{
    static char buffer[BUFFER] __attribute__((aligned(8)));
    if (argc != 3)
        return 2;
    NDPI_PROTOCOL_BITMASK all;
    module = ndpi_init_detection_module(ndpi_no_prefs);
    need(module != NULL, "ndpi_init_detection_module");
    NDPI_BITMASK_SET_ALL(all);
    ndpi_set_protocol_detection_bitmask2(module, &all);
    ndpi_finalize_initialization(module);
    struct nfq_handle *handle = nfq_open();
    need(handle != NULL, "nfq_open");
    struct nfq_q_handle *queue = nfq_create_queue(handle, atoi(argv[1]), take, NULL);
    need(queue != NULL, "nfq_create_queue");
    need(nfq_set_mode(queue, NFQNL_COPY_PACKET, 65535) >= 0, "nfq_set_mode");
    need(nfq_set_queue_maxlen(queue, atoi(argv[2])) >= 0, "nfq_set_queue_maxlen");
    int fd = nfq_fd(handle), size = RECEIVE_BUFFER;
    need(setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) == 0, "SO_RCVBUFFORCE");
    puts("ready");
    fflush(stdout);
    for (;;) {
        ssize_t count = unanswered < TURN ? recv(fd, buffer, sizeof buffer, unanswered ? MSG_DONTWAIT : 0) : -1;
        if (count > 0) {
            nfq_handle_packet(handle, buffer, count);
        } else if (unanswered > 0) {
            nfq_set_verdict_batch(queue, last, NF_ACCEPT);
            unanswered = 0;
        } else {
            need(errno == ENOBUFS || errno == EINTR, "recv");
        }
    }
}
