/* The whole guest in one header. Reading order: start.S, boot.c, memory.c, pattern.c, console.c, command.c, params.c,
 * then the commands: sweep.c with order.c, verify.c, probe.c; balloon.c beside them. */
#ifndef MICRO_H
#define MICRO_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef _Bool bool;
#define true 1
#define false 0

#define PROTOCOL_VERSION 1
#define PAGE_BYTES 4096UL
#define PAGE_WORDS 512UL
#define LINE_MAX_CHARS 255
#define TAG_MAX_CHARS 32
#define REGIONS_MAX 8
#define SAMPLES_MAX 4096UL
#define WINDOW (512UL << 30) /* virtual; RAM is mapped a second time from here on, see memory.c */
#define MMIO_AT_D0000000 0x200000UL /* virtual; 2 MiB of device registers each, mapped by start.S */
#define MMIO_AT_C0000000 0x400000UL
#define U64_MAX (~0UL)
#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

static inline void outb(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

static inline void relax(void)
{
    __asm__ volatile("pause");
}

/* The finalizer of splitmix64: every input bit reaches every output bit. */
static inline u64 mix(u64 x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9UL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebUL;
    return x ^ x >> 31;
}

/* Draw number `index` of the stream `seed`. */
static inline u64 draw(u64 seed, u64 index)
{
    return mix(mix(seed + 0x9e3779b97f4a7c15UL) + index);
}

/* A draw brought to 0..limit-1 without a division. */
static inline u64 below(u64 random, u64 limit)
{
    return (unsigned __int128)random * limit >> 64;
}

static inline bool percent_hit(u64 seed, u64 index, u64 percent)
{
    return below(draw(seed, index), 100) < percent;
}

/* clock.c: the tick counter. A vCPU that stands still shows as a gap between two ticks. */
struct clock {
    u64 ticks;
    u64 last;    /* TSC of the last tick */
    u64 gap_max; /* TSC cycles */
    u64 tsc_khz; /* 0: could not be measured */
};
extern struct clock clock;
void clock_calibrate(void);

static inline void tick(void)
{
    u64 now = rdtsc();
    /* A restore can set the TSC back: that is no gap. */
    if (now > clock.last && now - clock.last > clock.gap_max)
        clock.gap_max = now - clock.last;
    clock.last = now;
    clock.ticks++;
}

/* console.c */
struct text {
    const char *at;
    u64 length;
};
void put_char(char c);
void put(const char *string);
void put_text(struct text text);
void put_decimal(u64 value);
void put_hex(u64 value);
void put_pair(const char *key, u64 value);     /* " key=123" */
void put_pair_hex(const char *key, u64 value); /* " key=0x7b" */
bool text_is(struct text text, const char *string);
struct text next_word(struct text *rest);
bool read_line(struct text *line); /* false: longer than LINE_MAX_CHARS, `line` holds its beginning */

/* command.c: every command answers with exactly one line, begun by one of the three reply functions. */
void serve(void) __attribute__((noreturn));
void reply(const char *beginning);
void reply_ok(void);
void reply_error(const char *beginning);

/* params.c: `key=value` parameters. */
struct param {
    const char *key;
    u64 value; /* default before, value after parsing */
    u64 min, max;
    const char *const *words; /* not null: the value is one of these, `value` its number, `max` the last number */
    bool given;
};
bool params_parse(struct text rest, struct param *params, u64 count);
bool param_within(const struct param *param, u64 min, u64 max);
bool decimal_parse(struct text text, u64 *value);

/* memory.c: all RAM behind the guest's own pages is the heap, numbered 0..pages-1 across the holes of the address space. */
struct region {
    u64 address; /* physical */
    u64 pages;
};
struct heap {
    u64 pages;
    u64 filled;  /* every page below this number has been written; the balloon may have emptied some since */
    u64 written; /* pages that hold something */
    u64 seed;
    u64 memory_bytes; /* all usable RAM above 1 MiB, the guest's own pages included */
    u64 region_count;
    struct region regions[REGIONS_MAX]; /* heap pages only */
    u8 *versions;                       /* one a page; 0: never written, or given up since; reads as zeros */
    u64 *touched;                       /* one bit a page, scratch of a sweep */
    u64 *samples;                       /* SAMPLES_MAX, scratch of `loads` */
};
extern struct heap heap;
bool memory_map(const u8 *zero_page, u64 *root);
u64 page_address(u64 page); /* physical */
u64 *page_words(u64 page);

/* pattern.c: what a page must hold, and what was found instead. */
struct wrong {
    u64 words;
    u64 page, word, got, want; /* of the first wrong word */
};
u64 word_expected(u64 page, u64 word);
u64 page_check(u64 page, struct wrong *wrong); /* the number of wrong words on this page */
void page_write_next(u64 page);
u64 text_sum(void);
void put_wrong(const struct wrong *wrong); /* nothing when there is none */

/* order.c: which page is touched when. */
enum order_kind { SEQUENTIAL, STRIDED, SCATTERED, RANDOM, ZIPF };
struct permutation {
    u64 size, mask, shift;
    u64 multiply[3], add[3];
};
struct run {
    u64 first, length; /* pages; first counts from the start of the span */
};
struct order {
    enum order_kind kind;
    u64 span, stride, seed;
    u64 pages; /* touches */
    u64 displace, replace, seed2;
    u64 runs; /* of the undisplaced order; set by order_prepare, like all below */
    u64 last_length;
    u64 slots, window_runs, window;
    u64 replaced, spare, spares_tried;
    struct permutation place, again, within, spares;
};
void order_prepare(struct order *order);
struct run order_run(struct order *order, u64 position);

/* balloon.c: pages that the host has taken. */
struct balloon {
    volatile u32 *registers; /* null: there is no such device */
    struct balloon_memory *memory;
    u64 *map;          /* one bit a heap page: it is in the balloon */
    u64 polled, pause; /* TSC of the last look at the target; cycles until the next */
    u64 target, held;  /* pages, as are the two below */
    u64 inflated, deflated;
    u64 next, stride;   /* the heap page that is given up next, and how far below it the one after */
    u64 lowest;         /* no page below is in it */
    struct wrong stale; /* words that came back and were not zero */
};
extern struct balloon balloon;
void balloon_start(void);
void balloon_poll(bool idle); /* one look, one request at most; only when due */

static inline bool balloon_due(void)
{
    /* By the last tick, which costs nothing. A TSC that was set back counts as due. */
    return clock.last - balloon.polled >= balloon.pause;
}

static inline bool balloon_holds(u64 page)
{
    return balloon.held && balloon.map[page / 64] >> page % 64 & 1;
}

/* The commands. */
extern u64 text_sum_at_boot;
void command_info(struct text rest);
void command_sweep(struct text rest);
void command_check(struct text rest);
void command_fresh(struct text rest);
void command_load(struct text rest);
void command_loads(struct text rest);
void command_ticks(struct text rest);
void command_balloon(struct text rest);

#endif
