/* `sweep`: touch pages in a given order, check every word, rewrite some. */
#include "micro.h"

enum { PAGES, ORDER, STRIDE, SPAN, START, SEED, WRITE, COMPUTE, DISPLACE, REPLACE, SEED2, PARAMS };

static const char *const order_names[] = {"sequential", "strided", "scattered", "random", "zipf"};

struct sweep {
    struct order order;
    struct wrong wrong;
    u64 start, write, compute_cycles;
    u64 touches, distinct, runs, written, skipped, previous;
};

static void compute(u64 cycles)
{
    for (u64 begin = rdtsc(); rdtsc() - begin < cycles;)
        tick();
}

static void mark(struct sweep *sweep, u64 offset)
{
    u64 *word = &heap.touched[offset / 64], bit = 1UL << offset % 64;
    sweep->distinct += !(*word & bit);
    *word |= bit;
}

static void use(struct sweep *sweep, u64 offset)
{
    u64 page = sweep->start + offset;
    page_check(page, &sweep->wrong);
    mark(sweep, offset);
    sweep->runs += !sweep->touches || page != sweep->previous + 1;
    sweep->previous = page;
    if (percent_hit(sweep->order.seed, sweep->touches + sweep->skipped, sweep->write)) {
        page_write_next(page);
        sweep->written++;
    }
    sweep->touches++;
}

static void touch(struct sweep *sweep, u64 offset)
{
    if (balloon_holds(sweep->start + offset))
        sweep->skipped++;
    else
        use(sweep, offset);
    if (sweep->compute_cycles)
        compute(sweep->compute_cycles);
    tick();
    if (balloon_due())
        balloon_poll(false);
}

static u64 run_sweep(struct sweep *sweep)
{
    order_prepare(&sweep->order);
    for (u64 i = 0; i <= sweep->order.span / 64; i++)
        heap.touched[i] = 0;
    tick();
    if (balloon_due())
        balloon_poll(false); /* so that a short sweep has none of it in its cycles */
    u64 begin = rdtsc();
    for (u64 position = 0; position < sweep->order.runs; position++) {
        struct run run = order_run(&sweep->order, position);
        for (u64 i = 0; i < run.length; i++)
            touch(sweep, run.first + i);
    }
    return rdtsc() - begin;
}

static void put_sweep(const struct sweep *sweep, u64 cycles)
{
    reply_ok();
    put_pair("pages", sweep->touches);
    put_pair("distinct", sweep->distinct);
    put_pair("runs", sweep->runs);
    put_pair("wrong", sweep->wrong.words);
    put_pair("cycles", cycles);
    if (sweep->write)
        put_pair("written", sweep->written);
    if (sweep->order.replace)
        put_pair("replaced", sweep->order.replaced);
    if (sweep->skipped)
        put_pair("skipped", sweep->skipped);
    put_wrong(&sweep->wrong);
}

/* Defaults that depend on the heap, and limits that depend on other parameters. */
static bool settle(struct param *params)
{
    u64 start = params[START].value, kind = params[ORDER].value;
    if (!param_within(&params[START], 0, heap.pages - 1))
        return false;
    if (!params[SPAN].given)
        params[SPAN].value = (start < heap.filled ? heap.filled : heap.pages) - start;
    if (!param_within(&params[SPAN], 1, heap.pages - start))
        return false;
    u64 span = params[SPAN].value;
    if (!params[PAGES].given && params[PAGES].value > span)
        params[PAGES].value = span;
    bool repeats = kind == RANDOM || kind == ZIPF;
    if (!repeats && !param_within(&params[PAGES], 1, span))
        return false;
    if (repeats && params[REPLACE].value) {
        reply_error("replace: expected with order=sequential|strided|scattered, came with ");
        put(order_names[kind]);
        return false;
    }
    return true;
}

static u64 cycles_of(u64 nanoseconds)
{
    return clock.tsc_khz ? nanoseconds * clock.tsc_khz / 1000000 : nanoseconds;
}

void command_sweep(struct text rest)
{
    struct param params[PARAMS] = {
        [PAGES] = {"pages", 2048, 1, 1UL << 40, 0, false},
        [ORDER] = {"order", SCATTERED, 0, ZIPF, order_names, false},
        [STRIDE] = {"stride", 8, 1, 1UL << 40, 0, false},
        [SPAN] = {"span", 0, 1, 1UL << 40, 0, false},
        [START] = {"start", 0, 0, 1UL << 40, 0, false},
        [SEED] = {"seed", 1, 0, U64_MAX, 0, false},
        [WRITE] = {"write", 0, 0, 100, 0, false},
        [COMPUTE] = {"compute", 0, 0, 1000000000, 0, false},
        [DISPLACE] = {"displace", 0, 0, 1UL << 40, 0, false},
        [REPLACE] = {"replace", 0, 0, 100, 0, false},
        [SEED2] = {"seed2", 2, 0, U64_MAX, 0, false},
    };
    if (!params_parse(rest, params, PARAMS) || !settle(params))
        return;
    struct sweep sweep = {
        .order = {.kind = (enum order_kind)params[ORDER].value, .span = params[SPAN].value,
                  .stride = params[STRIDE].value, .seed = params[SEED].value, .pages = params[PAGES].value,
                  .displace = params[DISPLACE].value, .replace = params[REPLACE].value, .seed2 = params[SEED2].value},
        .start = params[START].value,
        .write = params[WRITE].value,
        .compute_cycles = cycles_of(params[COMPUTE].value),
    };
    u64 cycles = run_sweep(&sweep);
    put_sweep(&sweep, cycles);
}
