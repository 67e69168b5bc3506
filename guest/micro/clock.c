/* The TSC rate, measured against the 1.193182 MHz timer (PIT channel 2) that every KVM guest has. */
#include "micro.h"

#define PIT_HZ 1193182UL
#define PIT_CHANNEL_2 0x42
#define PIT_COMMAND 0x43
#define PIT_GATE 0x61
#define SPAN_COUNTS 2386UL  /* 2 ms */
#define READS 5

struct clock clock;

struct moment {
    u64 tsc;
    u64 doubt; /* how many cycles the reading took */
    u16 count;
};

static struct moment read_once(void)
{
    struct moment moment;
    u64 before = rdtsc();
    outb(PIT_COMMAND, 0x80); /* latch channel 2: the count is the one of this moment */
    u64 after = rdtsc();
    moment.count = inb(PIT_CHANNEL_2);
    moment.count |= (u16)(inb(PIT_CHANNEL_2) << 8);
    moment.tsc = before + (after - before) / 2;
    moment.doubt = after - before;
    return moment;
}

/* A vCPU may be preempted inside a reading: of several the quickest is the truest. */
static struct moment read_best(void)
{
    struct moment best = read_once();
    for (int i = 1; i < READS; i++) {
        struct moment moment = read_once();
        if (moment.doubt < best.doubt)
            best = moment;
    }
    return best;
}

void clock_calibrate(void)
{
    outb(PIT_GATE, (inb(PIT_GATE) & 0xfc) | 1); /* count, without the speaker */
    outb(PIT_COMMAND, 0xb4);                    /* channel 2, two bytes, mode 2: counts down, starts over at 65536 */
    outb(PIT_CHANNEL_2, 0);
    outb(PIT_CHANNEL_2, 0);
    struct moment first = read_best(), last = first;
    for (int tries = 0; tries < 10000 && (u16)(first.count - last.count) < SPAN_COUNTS; tries++) {
        relax();
        last = read_once();
    }
    last = read_best();
    u64 counts = (u16)(first.count - last.count);
    clock.tsc_khz = counts < SPAN_COUNTS ? 0 : (last.tsc - first.tsc) * PIT_HZ / counts / 1000;
}
