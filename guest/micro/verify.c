/* Commands on the whole heap: `check`, `fresh`, `info`. */
#include "micro.h"

u64 text_sum_at_boot;

void command_check(struct text rest)
{
    if (!params_parse(rest, 0, 0))
        return;
    struct wrong wrong = {0};
    u64 zero_pages = 0, skipped = 0, begin = rdtsc();
    bool text_changed = text_sum() != text_sum_at_boot;
    for (u64 page = 0; page < heap.pages; page++) {
        if (balloon_holds(page)) {
            skipped++;
        } else {
            zero_pages += !heap.versions[page];
            page_check(page, &wrong);
        }
        tick();
        if (balloon_due())
            balloon_poll(false);
    }
    u64 cycles = rdtsc() - begin;
    reply_ok();
    put_pair("pages", heap.pages - skipped);
    put_pair("zero_pages", zero_pages);
    put_pair("wrong", wrong.words + text_changed);
    put_pair("cycles", cycles);
    if (skipped)
        put_pair("skipped", skipped);
    if (text_changed)
        put(" text=changed");
    put_wrong(&wrong);
}

void command_fresh(struct text rest)
{
    struct param pages = {"pages", 1, 1, 1UL << 40, 0, false};
    if (!params_parse(rest, &pages, 1) || !param_within(&pages, 1, heap.pages - heap.written - balloon.held))
        return;
    struct wrong wrong = {0};
    u64 page = balloon.inflated ? 0 : heap.filled; /* below that, only the balloon leaves zeros */
    u64 begin = rdtsc();
    for (u64 i = 0; i < pages.value; i++) {
        while (heap.versions[page] || balloon_holds(page))
            page++;
        page_check(page, &wrong);
        page_write_next(page);
        tick();
    }
    u64 cycles = rdtsc() - begin;
    reply_ok();
    put_pair("pages", pages.value);
    put_pair("wrong", wrong.words);
    put_pair("cycles", cycles);
    put_wrong(&wrong);
}

void command_info(struct text rest)
{
    if (!params_parse(rest, 0, 0))
        return;
    reply_ok();
    put_pair("pages", heap.pages);
    put_pair("filled", heap.filled);
    put_pair("written", heap.written);
    put_pair("seed", heap.seed);
    put_pair("version", PROTOCOL_VERSION);
    put_pair("memory_bytes", heap.memory_bytes);
    put_pair("tsc_khz", clock.tsc_khz);
    put(" regions=");
    for (u64 i = 0; i < heap.region_count; i++) {
        put(i ? "," : "");
        put_hex(heap.regions[i].address);
        put_char('+');
        put_decimal(heap.regions[i].pages);
    }
}
