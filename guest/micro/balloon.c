/* A virtio balloon, polled: the host says how many pages it wants, the guest gives heap pages up and takes them back.
 *
 * A page that is given up is never touched again until it has been asked back, and it comes back as zeros: each word is
 * looked at, then the page is an ordinary one of version 0. One request of up to 256 pages at a time, the queues and its
 * page frames in one page of guest memory. Firecracker answers a request to give up before it frees the pages, but it
 * answers requests in their order: the answer to a later request to take back also says that they have been freed. */
#include "micro.h"

#define REGISTER_BLOCKS 16UL /* looked at in each place, 4 KiB apart; the balloon is among the first of its devices */
#define VIRTIO_MAGIC 0x74726976 /* "virt" */
#define BALLOON_DEVICE 5
#define VERSION_1 1 /* feature bit 32: bit 0 of the second word */
#define REQUEST_PAGES 256UL /* Firecracker takes no more at once */
#define POLL_CYCLES (1UL << 24) /* 4 to 8 ms: reading the target is an exit to the VMM, 30 us under a nested KVM */

/* virtio-mmio registers, as numbers of 32-bit words. */
enum {
    MAGIC = 0x00 / 4, DEVICE_ID = 0x08 / 4, DRIVER_FEATURES = 0x20 / 4, DRIVER_FEATURES_SELECT = 0x24 / 4,
    QUEUE_SELECT = 0x30 / 4, QUEUE_SIZE = 0x38 / 4, QUEUE_READY = 0x44 / 4, QUEUE_NOTIFY = 0x50 / 4, STATUS = 0x70 / 4,
    QUEUE_DESCRIPTORS = 0x80 / 4, QUEUE_AVAILABLE = 0x90 / 4, QUEUE_USED = 0xa0 / 4, TARGET = 0x100 / 4, ACTUAL = 0x104 / 4,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { INFLATE, DEFLATE, QUEUES };

/* A split virtqueue of one entry: its number is 0 everywhere, so only the two indices ever change. */
struct queue {
    struct {
        u64 address;
        u32 length;
        u16 flags, next;
    } descriptor __attribute__((aligned(16)));
    struct {
        u16 flags, index, ring[1];
    } available;
    struct {
        u16 flags, index;
        struct {
            u32 descriptor, length;
        } ring[1];
    } used __attribute__((aligned(4)));
};

struct balloon_memory {
    struct queue queues[QUEUES];
    u32 frames[REQUEST_PAGES]; /* page frame numbers, for the device */
    u32 pages[REQUEST_PAGES];  /* the same as heap pages */
};
_Static_assert(sizeof(struct balloon_memory) <= PAGE_BYTES, "memory.c reserves one page");

struct balloon balloon = {.pause = U64_MAX};

static u64 physical(const void *at)
{
    return (u64)at - WINDOW;
}

/* Where Firecracker's device registers begin, by version: start.S has mapped both. */
static volatile u32 *find_registers(void)
{
    static const u64 places[] = {MMIO_AT_D0000000, MMIO_AT_C0000000};
    for (u64 i = 0; i < COUNT_OF(places); i++)
        for (u64 block = 0; block < REGISTER_BLOCKS; block++) {
            volatile u32 *registers = (volatile u32 *)(places[i] + block * PAGE_BYTES);
            if (registers[MAGIC] == VIRTIO_MAGIC && registers[DEVICE_ID] == BALLOON_DEVICE)
                return registers;
        }
    return 0;
}

static void write_address(u64 number, const void *at)
{
    balloon.registers[number] = (u32)physical(at);
    balloon.registers[number + 1] = (u32)(physical(at) >> 32);
}

static void start_queue(u32 number)
{
    struct queue *queue = &balloon.memory->queues[number];
    queue->descriptor.address = physical(balloon.memory->frames);
    queue->available.flags = 1; /* no interrupts, please */
    balloon.registers[QUEUE_SELECT] = number;
    balloon.registers[QUEUE_SIZE] = 1;
    write_address(QUEUE_DESCRIPTORS, &queue->descriptor);
    write_address(QUEUE_AVAILABLE, &queue->available);
    write_address(QUEUE_USED, &queue->used);
    balloon.registers[QUEUE_READY] = 1;
}

void balloon_start(void)
{
    volatile u32 *registers = find_registers();
    if (!registers)
        return;
    balloon.registers = registers;
    registers[STATUS] = 0;
    registers[STATUS] = ACKNOWLEDGE;
    registers[STATUS] = ACKNOWLEDGE | DRIVER;
    for (u32 word = 0; word < 2; word++) {
        registers[DRIVER_FEATURES_SELECT] = word;
        registers[DRIVER_FEATURES] = word ? VERSION_1 : 0;
    }
    registers[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    for (u32 number = 0; number < QUEUES; number++)
        start_queue(number);
    registers[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    balloon.next = (heap.filled ? heap.filled : heap.pages) - 1;
    balloon.stride = 1;
    balloon.lowest = heap.pages;
    balloon.pause = POLL_CYCLES;
}

/* Returns when the device has answered. A snapshot in between is no harm: a resumed Firecracker looks at its queues. */
static void request(u32 number, u64 count)
{
    struct queue *queue = &balloon.memory->queues[number];
    for (u64 i = 0; i < count; i++)
        balloon.memory->frames[i] = (u32)(page_address(balloon.memory->pages[i]) / PAGE_BYTES);
    queue->descriptor.length = (u32)(count * sizeof(u32));
    u16 index = queue->available.index + 1;
    __atomic_store_n(&queue->available.index, index, __ATOMIC_SEQ_CST);
    balloon.registers[QUEUE_NOTIFY] = number;
    while (__atomic_load_n(&queue->used.index, __ATOMIC_ACQUIRE) != index) {
        tick();
        relax();
    }
}

static void flip_held(u64 page)
{
    balloon.map[page / 64] ^= 1UL << page % 64;
}

static u64 choose(void)
{
    u64 page = balloon.next;
    while (balloon_holds(page))
        page = (page ? page : heap.pages) - 1;
    balloon.next = (page + heap.pages - balloon.stride) % heap.pages;
    return page;
}

static __attribute__((noinline)) void inflate(u64 count)
{
    for (u64 i = 0; i < count; i++) {
        u64 page = choose();
        balloon.memory->pages[i] = (u32)page;
        flip_held(page);
        balloon.held++;
        heap.written -= !!heap.versions[page];
        heap.versions[page] = 0;
        if (page < balloon.lowest)
            balloon.lowest = page;
    }
    request(INFLATE, count);
    balloon.inflated += count;
}

/* The lowest pages come back first. */
static __attribute__((noinline)) void deflate(u64 count)
{
    for (u64 i = 0; i < count; balloon.lowest++)
        if (balloon_holds(balloon.lowest))
            balloon.memory->pages[i++] = (u32)balloon.lowest;
    request(DEFLATE, count);
    for (u64 i = 0; i < count; i++) {
        flip_held(balloon.memory->pages[i]);
        balloon.held--;
        page_check(balloon.memory->pages[i], &balloon.stale);
        tick();
    }
    balloon.deflated += count;
}

static u64 at_most(u64 value, u64 limit)
{
    return value < limit ? value : limit;
}

/* With the hot code: the loop that waits for a command runs it too. */
__attribute__((section(".text.poll"))) void balloon_poll(bool idle)
{
    u64 begin = rdtsc();
    balloon.target = balloon.registers[TARGET];
    u64 wanted = at_most(balloon.target, heap.pages), held = balloon.held;
    if (held < wanted)
        inflate(at_most(wanted - held, REQUEST_PAGES));
    else if (held > wanted)
        deflate(at_most(held - wanted, REQUEST_PAGES));
    if (balloon.held != held)
        balloon.registers[ACTUAL] = (u32)balloon.held;
    balloon.polled = rdtsc();
    /* A sweep gets half of the time while there is more to do. */
    balloon.pause = balloon.held == wanted ? POLL_CYCLES : idle ? 0 : balloon.polled - begin;
}

void command_balloon(struct text rest)
{
    enum { NEXT, STRIDE, PARAMS };
    struct param params[PARAMS] = {
        [NEXT] = {"next", balloon.next, 0, U64_MAX, 0, false},
        [STRIDE] = {"stride", balloon.stride, 1, U64_MAX, 0, false},
    };
    if (!params_parse(rest, params, PARAMS))
        return;
    if (params[NEXT].given && !param_within(&params[NEXT], 0, heap.pages - 1))
        return;
    if (params[STRIDE].given && !param_within(&params[STRIDE], 1, heap.pages))
        return;
    balloon.next = params[NEXT].value;
    balloon.stride = params[STRIDE].value;
    if (balloon.registers)
        balloon_poll(true);
    reply_ok();
    put_pair("device", !!balloon.registers);
    put_pair("target", balloon.target);
    put_pair("held", balloon.held);
    put_pair("inflated", balloon.inflated);
    put_pair("deflated", balloon.deflated);
    put_pair("stale", balloon.stale.words);
    put_wrong(&balloon.stale);
}
