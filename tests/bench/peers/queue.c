// A loop on libnetfilter_queue that accepts everything: one verdict a packet, or one for all that a drained socket held; or one
// a packet, and never asleep.
//
//   queue single|batch|spin NUMBER COPY_RANGE gso|segments MAX_LEN [PACKETS]
//
// PACKETS: how many a batch answers at most, 256 by default.
#include <arpa/inet.h>
#include <errno.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BUFFER = 65536 + 4096, RECEIVE_BUFFER = 8 << 20 };

static int batch;
static int unanswered;
static uint32_t last;

static int take(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *packet, void *data)
{
    (void)message;
    (void)data;
    last = ntohl(nfq_get_msg_packet_hdr(packet)->packet_id);
    unanswered++;
    return batch ? 0 : nfq_set_verdict(queue, last, NF_ACCEPT, 0, NULL);
}

static void need(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    static char buffer[BUFFER] __attribute__((aligned(8)));
    if (argc != 6 && argc != 7)
        return 2;
    int most = argc == 7 ? atoi(argv[6]) : 256;
    batch = !strcmp(argv[1], "batch");
    int spin = !strcmp(argv[1], "spin");
    struct nfq_handle *handle = nfq_open();
    need(handle != NULL, "nfq_open");
    struct nfq_q_handle *queue = nfq_create_queue(handle, atoi(argv[2]), take, NULL);
    need(queue != NULL, "nfq_create_queue");
    need(nfq_set_mode(queue, NFQNL_COPY_PACKET, atoi(argv[3])) >= 0, "nfq_set_mode");
    need(nfq_set_queue_maxlen(queue, atoi(argv[5])) >= 0, "nfq_set_queue_maxlen");
    if (!strcmp(argv[4], "gso"))
        need(nfq_set_queue_flags(queue, NFQA_CFG_F_GSO, NFQA_CFG_F_GSO) >= 0, "nfq_set_queue_flags");
    int fd = nfq_fd(handle), size = RECEIVE_BUFFER;
    need(setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) == 0, "SO_RCVBUFFORCE");
    puts("ready");
    fflush(stdout);
    for (;;) {
        // A batch is sent when nothing more waits, or when there is enough of it.
        int wait = !spin && (!batch || unanswered == 0);
        ssize_t count = unanswered < most || !batch ? recv(fd, buffer, sizeof buffer, wait ? 0 : MSG_DONTWAIT) : -1;
        if (count > 0) {
            nfq_handle_packet(handle, buffer, count);
        } else if (unanswered > 0 && batch) {
            nfq_set_verdict_batch(queue, last, NF_ACCEPT);
            unanswered = 0;
        } else {
            need(count < 0 && (errno == ENOBUFS || errno == EINTR || (spin && errno == EAGAIN)), "recv");
        }
    }
}
