/* From the first instruction in ring 3 to the `ready` line. */
#include "micro.h"

#define COMMAND_LINE_POINTER 0x228
#define COMMAND_LINE_MAX 4096

static const char *command_line(const u8 *zero_page)
{
    u64 address = 0;
    for (int i = 3; i >= 0; i--)
        address = address << 8 | zero_page[COMMAND_LINE_POINTER + i];
    return (const char *)address;
}

static bool starts_with(struct text word, const char *prefix, struct text *rest)
{
    u64 i = 0;
    for (; prefix[i]; i++)
        if (i >= word.length || word.at[i] != prefix[i])
            return false;
    *rest = (struct text){word.at + i, word.length - i};
    return true;
}

/* The kernel command line is shared with the VMM's own words: what is not ours is passed over. */
static void read_arguments(const char *line, u64 *seed, u64 *fill_percent)
{
    struct text rest = {line, 0}, word, value;
    while (line && rest.length < COMMAND_LINE_MAX && line[rest.length])
        rest.length++;
    while ((word = next_word(&rest)).length) {
        u64 number;
        if (starts_with(word, "seed=", &value) && decimal_parse(value, &number))
            *seed = number;
        else if (starts_with(word, "fill=", &value) && decimal_parse(value, &number) && number <= 100)
            *fill_percent = number;
    }
}

static void put_ready(void)
{
    put("ready micro ");
    put_decimal(PROTOCOL_VERSION);
    put_pair("pages", heap.pages);
    put_pair("filled", heap.filled);
    put_pair("seed", heap.seed);
    put_char('\n');
}

void boot(const u8 *zero_page, u64 *root)
{
    u64 fill_percent = 75;
    heap.seed = 1;
    read_arguments(command_line(zero_page), &heap.seed, &fill_percent);
    text_sum_at_boot = text_sum();
    clock_calibrate();
    if (!memory_map(zero_page, root)) {
        put("error: expected usable memory from 1 MiB to beyond the guest's own pages, came less\n");
        for (;;)
            relax();
    }
    for (u64 pages = heap.pages * fill_percent / 100; heap.filled < pages; tick())
        page_write_next(heap.filled);
    balloon_start();
    clock.last = rdtsc();
    clock.gap_max = 0;
    put_ready();
    serve();
}
