/*
 * The programs of [inline]: which packets of an interface go to the worker, and the way back.
 *
 * Compiled by packaging/bpf when the agent is built; loaded by host/bpf.py, which knows the maps by their names and these structures
 * by their layout (capture/link_maps.py). "Next" is TCX_NEXT, never OK: whatever else is attached has its turn.
 */
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define NEXT (-1)
#define DROP 2

#define FROM_CONTAINER 0
#define TO_CONTAINER 1

/* As libbpf's older definition of a map: five numbers. */
struct map {
    __u32 type, key_size, value_size, max_entries, flags;
};

struct settings {
    __u64 patience;      /* nanoseconds without a heartbeat until everything passes */
    __u64 most_bytes;    /* on their way to the worker */
    __u32 most;          /* packets on their way to the worker */
    __u32 pair;          /* our end of the pair, as an interface index */
    __u32 secret;        /* the mark of what comes back */
    __u32 everything;    /* no port is named */
    __u32 sides;         /* bit WAY: the source port counts; bit 2 + WAY: the destination port */
    __u32 unused;
};

struct ports {
    __u64 tcp[1024], udp[1024];
};

struct live {
    __u64 heartbeat, down, down_bytes, unused[5]; /* the worker's */
    __u64 up, up_bytes, back;                     /* ours; back: frames that came back from the worker */
};

struct counts {
    __u64 up, accepted, dropped, stale, full, tagged, fragments, unread;
};

struct interface {
    struct counts way[2];
};

struct flow_key {
    __u32 interface;
    __u16 local_port, remote_port;
    __u32 protocol;
    __u8 local[16], remote[16];
};

struct flow {
    __u64 last;     /* when a packet was seen */
    __u64 idle;     /* nanoseconds after which it is forgotten */
    __u32 verdict;  /* 1: accept, 0: drop */
    __u32 unused;
};

struct map SEC("maps") settings = {BPF_MAP_TYPE_ARRAY, 4, sizeof(struct settings), 1, 0};
struct map SEC("maps") ports = {BPF_MAP_TYPE_ARRAY, 4, sizeof(struct ports), 1, 0};
struct map SEC("maps") live = {BPF_MAP_TYPE_ARRAY, 4, sizeof(struct live), 1, BPF_F_MMAPABLE};
struct map SEC("maps") interfaces = {BPF_MAP_TYPE_HASH, 4, sizeof(struct interface), 4096, 0};
struct map SEC("maps") flows = {BPF_MAP_TYPE_LRU_HASH, sizeof(struct flow_key), sizeof(struct flow), 65536, 0};

static void *(*lookup)(void *, const void *) = (void *)BPF_FUNC_map_lookup_elem;
static long (*delete)(void *, const void *) = (void *)BPF_FUNC_map_delete_elem;
static __u64 (*now)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*load)(const void *, __u32, void *, __u32) = (void *)BPF_FUNC_skb_load_bytes;
static long (*redirect)(__u32, __u64) = (void *)BPF_FUNC_redirect;

#define ADD(place, number) __sync_fetch_and_add(&(place), (number))
#define SWAP16(x) __builtin_bswap16(x)

struct packet {
    __u8 src[16], dst[16];
    __u16 sport, dport; /* as in the packet */
    __u32 protocol;
    __u32 flags; /* of TCP */
};

/* Read addresses, protocol and ports. 0: read. 1: a later fragment. 2: not to be read. */
INLINE int read_packet(struct __sk_buff *skb, struct packet *found)
{
    __u32 offset = 14;
    __u8 header[40];
    __u8 protocol;
    if (skb->protocol == SWAP16(0x0800)) {
        if (load(skb, offset, header, 20))
            return 2;
        if ((header[6] & 0x1f) || header[7])
            return 1;
        protocol = header[9];
        __builtin_memset(found->src, 0, 32);
        __builtin_memcpy(found->src, header + 12, 4);
        __builtin_memcpy(found->dst, header + 16, 4);
        offset += (header[0] & 15) * 4;
    } else {
        if (load(skb, offset, header, 40))
            return 2;
        __builtin_memcpy(found->src, header + 8, 16);
        __builtin_memcpy(found->dst, header + 24, 16);
        protocol = header[6];
        offset += 40;
#pragma unroll
        for (int i = 0; i < 6; i++) {
            __u8 extension[8];
            if (protocol != 0 && protocol != 43 && protocol != 44 && protocol != 51 && protocol != 60)
                break;
            if (load(skb, offset, extension, 8))
                return 2;
            if (protocol == 44) {
                if (extension[2] || (extension[3] & 0xf8))
                    return 1;
                offset += 8;
            } else if (protocol == 51) {
                offset += (extension[1] + 2) * 4;
            } else {
                offset += (extension[1] + 1) * 8;
            }
            protocol = extension[0];
        }
        if (protocol == 0 || protocol == 43 || protocol == 44 || protocol == 51 || protocol == 60)
            return 2;
    }
    found->protocol = protocol;
    found->sport = found->dport = 0;
    found->flags = 0;
    if (protocol == 6 || protocol == 17) {
        __u16 both[2];
        if (load(skb, offset, both, 4))
            return 2;
        found->sport = both[0];
        found->dport = both[1];
        if (protocol == 6) {
            __u8 flags;
            if (load(skb, offset + 13, &flags, 1))
                return 2;
            found->flags = flags;
        }
    }
    return 0;
}

/* sides: bit 0 for the source port, bit 2 for the destination port. */
INLINE int chosen(const struct packet *packet, const struct ports *named, __u32 sides)
{
    __u16 sport = SWAP16(packet->sport), dport = SWAP16(packet->dport);
    __u64 source = sides & 1, destination = (sides >> 2) & 1;
    if (packet->protocol == 6)
        return ((named->tcp[(sport >> 6) & 1023] >> (sport & 63)) & source) |
               ((named->tcp[(dport >> 6) & 1023] >> (dport & 63)) & destination);
    if (packet->protocol == 17)
        return ((named->udp[(sport >> 6) & 1023] >> (sport & 63)) & source) |
               ((named->udp[(dport >> 6) & 1023] >> (dport & 63)) & destination);
    return 0;
}

/* What was decided on the flow: -1 nothing, 0 drop, 1 accept. A new connection with the same five-tuple is undecided. */
INLINE int decided(const struct packet *packet, __u32 interface, int way, __u64 time)
{
    struct flow_key key = {};
    key.interface = interface;
    key.protocol = packet->protocol;
    if (way == FROM_CONTAINER) {
        __builtin_memcpy(key.local, packet->src, 16);
        __builtin_memcpy(key.remote, packet->dst, 16);
        key.local_port = packet->sport;
        key.remote_port = packet->dport;
    } else {
        __builtin_memcpy(key.local, packet->dst, 16);
        __builtin_memcpy(key.remote, packet->src, 16);
        key.local_port = packet->dport;
        key.remote_port = packet->sport;
    }
    struct flow *flow = lookup(&flows, &key);
    if (!flow)
        return -1;
    if (time - flow->last > flow->idle || (packet->protocol == 6 && (packet->flags & 0x12) == 0x02)) {
        delete(&flows, &key);
        return -1;
    }
    flow->last = time;
    return flow->verdict != 0;
}

INLINE int judge(struct __sk_buff *skb, int way)
{
    __u32 zero = 0, index = skb->ifindex;
    struct packet packet;
    struct settings *set = lookup(&settings, &zero);
    if (!set)
        return NEXT;
    struct live *alive = lookup(&live, &zero);
    if (!alive)
        return NEXT;
    if (way == FROM_CONTAINER && skb->mark == set->secret) {
        ADD(alive->back, 1);
        skb->mark = 0;
        return NEXT;
    }
    struct interface *interface = lookup(&interfaces, &index);
    if (!interface)
        return NEXT;
    struct counts *counts = &interface->way[way];
    if (skb->vlan_present || skb->protocol == SWAP16(0x8100) || skb->protocol == SWAP16(0x88a8)) {
        ADD(counts->tagged, 1);
        return NEXT;
    }
    if (skb->protocol != SWAP16(0x0800) && skb->protocol != SWAP16(0x86dd))
        return NEXT;
    switch (read_packet(skb, &packet)) {
    case 1:
        ADD(counts->fragments, 1);
        return NEXT;
    case 2:
        ADD(counts->unread, 1);
        return NEXT;
    }
    if (!set->everything) {
        struct ports *named = lookup(&ports, &zero);
        if (!named || !chosen(&packet, named, set->sides >> way))
            return NEXT;
    }
    __u64 time = now();
    int verdict = decided(&packet, index, way, time);
    if (verdict >= 0) {
        if (verdict) {
            ADD(counts->accepted, 1);
            return NEXT;
        }
        ADD(counts->dropped, 1);
        return DROP;
    }
    /* The clock of the worker may be ahead of the one read here by the time that it took to read it. */
    if ((__s64)(time - alive->heartbeat) > (__s64)set->patience) {
        ADD(counts->stale, 1);
        return NEXT;
    }
    if ((__s64)(alive->up - alive->down) >= (__s64)set->most ||
        (__s64)(alive->up_bytes - alive->down_bytes) >= (__s64)set->most_bytes) {
        ADD(counts->full, 1);
        return NEXT;
    }
    ADD(alive->up, 1);
    ADD(alive->up_bytes, skb->len);
    ADD(counts->up, 1);
    skb->mark = index | (way == TO_CONTAINER ? 0x80000000u : 0);
    return redirect(set->pair, 0);
}

/* On an interface of a container, host's end. */
SEC("tcx/from") int from_container(struct __sk_buff *skb)
{
    return judge(skb, FROM_CONTAINER);
}

SEC("tcx/to") int to_container(struct __sk_buff *skb)
{
    return judge(skb, TO_CONTAINER);
}

/* On our end of the pair: what the worker lets pass from a container. The mark says from which; nothing else comes here. */
SEC("tcx/back") int back(struct __sk_buff *skb)
{
    __u32 zero = 0, index = skb->mark;
    struct settings *set = lookup(&settings, &zero);
    if (!set || !index)
        return DROP;
    skb->mark = set->secret;
    return redirect(index, BPF_F_INGRESS);
}

/* On the worker's end: the packet socket has seen it, and the stack must not. */
SEC("tcx/end") int end(struct __sk_buff *skb)
{
    return DROP;
}

char granted[] SEC("license") = "GPL";
