/* Commands that measure: `load`, `loads`, `ticks`. */
#include "micro.h"

/* The fences keep the load inside the two readings. */
static u64 timed_load(u64 page, u64 *wrong)
{
    u64 want = word_expected(page, 0);
    const volatile u64 *word = page_words(page);
    __asm__ volatile("lfence" : : : "memory");
    u64 begin = rdtsc();
    __asm__ volatile("lfence" : : : "memory");
    u64 got = *word;
    __asm__ volatile("lfence" : : : "memory");
    u64 cycles = rdtsc() - begin;
    *wrong += got != want;
    tick();
    return cycles;
}

static bool outside_balloon(u64 start, u64 stride, u64 count)
{
    for (u64 page = start; count--; page += stride)
        if (balloon_holds(page)) {
            reply_error("expected pages outside the balloon, came ");
            put_decimal(page);
            return false;
        }
    return true;
}

void command_load(struct text rest)
{
    struct param page = {"page", 0, 0, U64_MAX, 0, false};
    if (!params_parse(rest, &page, 1) || !param_within(&page, 0, heap.pages - 1) || !outside_balloon(page.value, 1, 1))
        return;
    u64 wrong = 0, cycles = timed_load(page.value, &wrong);
    reply_ok();
    put_pair("cycles", cycles);
    put_pair("wrong", wrong);
}

static void sift_down(u64 *values, u64 root, u64 count)
{
    for (u64 child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && values[child + 1] > values[child])
            child++;
        if (values[root] >= values[child])
            return;
        u64 swap = values[root];
        values[root] = values[child];
        values[child] = swap;
    }
}

static void sort(u64 *values, u64 count)
{
    for (u64 root = count / 2; root-- > 0;)
        sift_down(values, root, count);
    for (u64 end = count; end-- > 1;) {
        u64 swap = values[0];
        values[0] = values[end];
        values[end] = swap;
        sift_down(values, 0, end);
    }
}

/* Nearest rank. */
static u64 percentile(const u64 *sorted, u64 count, u64 percent)
{
    return sorted[(count * percent + 99) / 100 - 1];
}

void command_loads(struct text rest)
{
    enum { PAGES, START, STRIDE, PARAMS };
    struct param params[PARAMS] = {
        [PAGES] = {"pages", 1, 1, SAMPLES_MAX, 0, false},
        [START] = {"start", 0, 0, U64_MAX, 0, false},
        [STRIDE] = {"stride", 1, 1, 1UL << 40, 0, false},
    };
    if (!params_parse(rest, params, PARAMS) || !param_within(&params[START], 0, heap.pages - 1))
        return;
    u64 start = params[START].value, stride = params[STRIDE].value;
    if (!param_within(&params[PAGES], 1, (heap.pages - 1 - start) / stride + 1))
        return;
    if (!outside_balloon(start, stride, params[PAGES].value))
        return;
    u64 count = params[PAGES].value, wrong = 0, *samples = heap.samples;
    for (u64 i = 0; i < count; i++)
        samples[i] = 0; /* the pages of the samples themselves must not fault in between two loads */
    for (u64 i = 0; i < count; i++)
        samples[i] = timed_load(start + i * stride, &wrong);
    sort(samples, count);
    reply_ok();
    put_pair("n", count);
    put_pair("min", samples[0]);
    put_pair("p50", percentile(samples, count, 50));
    put_pair("p99", percentile(samples, count, 99));
    put_pair("max", samples[count - 1]);
    put_pair("wrong", wrong);
}

void command_ticks(struct text rest)
{
    struct param reset = {"reset", 0, 0, 1, 0, false};
    if (!params_parse(rest, &reset, 1))
        return;
    u64 gap_max = clock.gap_max; /* the answer is not to count itself in */
    if (reset.value)
        clock.gap_max = 0;
    reply_ok();
    put_pair("ticks", clock.ticks);
    put_pair("gap_max", gap_max);
    put_pair("tsc_khz", clock.tsc_khz);
}
