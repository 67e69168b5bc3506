/* Orders of touching pages, computed run by run: nothing is stored, so any number of pages costs the same memory. */
#include "micro.h"

#define SLOT_PAGES 4UL

/* Domains of draw(): the same seed gives independent streams. */
enum { PLACE = 1UL << 56, AGAIN = 2UL << 56, SHAPE = 3UL << 56, REPLACE = 4UL << 56, SPARE = 5UL << 56, WITHIN = 6UL << 56 };

/* A permutation of 0..size-1: bijective steps on the next power of two, walked until the value is inside. */
static void permutation_init(struct permutation *permutation, u64 size, u64 seed)
{
    u64 bits = 1;
    while (bits < 63 && 1UL << bits < size)
        bits++;
    permutation->size = size;
    permutation->mask = (1UL << bits) - 1;
    permutation->shift = (bits + 1) / 2;
    for (u64 i = 0; i < 3; i++) {
        permutation->multiply[i] = draw(seed, 2 * i) | 1;
        permutation->add[i] = draw(seed, 2 * i + 1);
    }
}

static u64 permute(const struct permutation *permutation, u64 x)
{
    do
        for (u64 i = 0; i < 3; i++) {
            x = (x * permutation->multiply[i] + permutation->add[i]) & permutation->mask;
            x ^= x >> permutation->shift;
        }
    while (x >= permutation->size);
    return x;
}

static u64 smaller(u64 a, u64 b)
{
    return a < b ? a : b;
}

static u64 slot_pages(const struct order *order, u64 slot)
{
    return smaller(SLOT_PAGES, order->span - slot * SLOT_PAGES);
}

/* Column after column of a table that is `stride` pages wide: each page of the span once. */
static struct run strided_run(const struct order *order, u64 index)
{
    u64 rows = order->span / order->stride, longer = order->span % order->stride;
    u64 column, row, in_longer = longer * (rows + 1);
    if (index < in_longer) {
        column = index / (rows + 1);
        row = index % (rows + 1);
    } else {
        column = longer + (index - in_longer) / rows;
        row = (index - in_longer) % rows;
    }
    return (struct run){column + row * order->stride, 1};
}

/* First round: one run of 1 to 4 pages in each slot, slots in random order. Second round, when more pages are wanted: what
 * the first left over in front of its run and behind it, again in random order. So the whole span is touched once. */
static struct run scattered_run(const struct order *order, u64 index)
{
    bool first_round = index < order->slots;
    u64 part = first_round ? 0 : (index - order->slots) % 2;
    u64 slot = first_round ? permute(&order->place, index) : permute(&order->again, (index - order->slots) / 2);
    u64 pages = slot_pages(order, slot), shape = draw(order->seed + SHAPE, slot);
    u64 length = 1 + shape % pages;
    u64 offset = (shape >> 32) % (pages - length + 1);
    u64 first = slot * SLOT_PAGES;
    if (first_round)
        return (struct run){first + offset, length};
    if (part == 0)
        return (struct run){first, offset};
    return (struct run){first + offset + length, pages - offset - length};
}

/* Zipf with an exponent of about 1 has a logarithmic distribution function: drawing the logarithm of the rank evenly gives
 * it in integers. Logarithm and power are the same straight lines between powers of two, in 16.16 fixed point. */
static u64 zipf_rank(u64 span, u64 random)
{
    u64 whole = 63 - (u64)__builtin_clzl(span + 1);
    u64 fraction = (((span + 1) << 16) >> whole) & 0xffff;
    u64 logarithm = below(random, whole << 16 | fraction);
    u64 octave = logarithm >> 16;
    u64 within = (logarithm & 0xffff) << 16 | (mix(random) & 0xffff);
    return (1UL << octave) + ((within << octave) >> 32) - 1;
}

static struct run plain_run(const struct order *order, u64 index)
{
    switch (order->kind) {
    case SEQUENTIAL:
        return (struct run){index * SLOT_PAGES, slot_pages(order, index)};
    case STRIDED:
        return strided_run(order, index);
    case SCATTERED:
        return scattered_run(order, index);
    case RANDOM:
        return (struct run){below(draw(order->seed + PLACE, index), order->span), 1};
    default:
        return (struct run){permute(&order->place, zipf_rank(order->span, draw(order->seed + SHAPE, index))), 1};
    }
}

static void count_runs(struct order *order)
{
    u64 pages = 0;
    order->last_length = 1;
    order->runs = order->pages;
    if (order->kind != SEQUENTIAL && order->kind != SCATTERED)
        return;
    for (order->runs = 0; pages < order->pages; order->runs++) {
        order->last_length = smaller(plain_run(order, order->runs).length, order->pages - pages);
        pages += order->last_length;
    }
}

/* A window holds about `displace` pages; a slot's run has 2.5 on average. */
static u64 window_runs(const struct order *order)
{
    u64 runs = order->displace;
    if (order->kind == SEQUENTIAL)
        runs = order->displace / SLOT_PAGES;
    else if (order->kind == SCATTERED)
        runs = order->displace * 2 / 5;
    return runs < 2 ? 2 : runs;
}

void order_prepare(struct order *order)
{
    bool slotted = order->kind == SEQUENTIAL || order->kind == SCATTERED;
    order->slots = (order->span + SLOT_PAGES - 1) / SLOT_PAGES;
    u64 places = slotted ? order->slots : order->span;
    permutation_init(&order->place, places, order->seed + PLACE);
    permutation_init(&order->again, places, order->seed + AGAIN);
    count_runs(order);
    order->window = U64_MAX;
    order->window_runs = order->displace ? window_runs(order) : 0;
    order->replaced = order->spares_tried = 0;
    order->spare = places > order->runs ? places - order->runs : 0;
    permutation_init(&order->spares, order->spare, order->seed2 + SPARE);
}

static u64 displaced(struct order *order, u64 position)
{
    if (!order->window_runs)
        return position;
    u64 window = position / order->window_runs, base = window * order->window_runs;
    if (window != order->window) {
        order->window = window;
        permutation_init(&order->within, smaller(order->window_runs, order->runs - base), draw(order->seed2 + WITHIN, window));
    }
    return base + permute(&order->within, position - base);
}

/* A run of the same length at a place that the plain order would have come to only later. The last slot of the span may be
 * too short for it: then the run stays as it is. */
static struct run replaced(struct order *order, struct run run)
{
    struct run other = plain_run(order, order->runs + permute(&order->spares, order->spares_tried++));
    if (order->kind != STRIDED) {
        u64 slot = other.first / SLOT_PAGES, room = slot_pages(order, slot);
        if (room < run.length)
            return run;
        other.first = slot * SLOT_PAGES + draw(order->seed2 + SHAPE, slot) % (room - run.length + 1);
    }
    order->replaced++;
    return (struct run){other.first, run.length};
}

struct run order_run(struct order *order, u64 position)
{
    u64 index = displaced(order, position);
    struct run run = plain_run(order, index);
    if (index == order->runs - 1)
        run.length = order->last_length;
    if (run.length && order->spares_tried < order->spare && percent_hit(order->seed2 + REPLACE, index, order->replace))
        return replaced(order, run);
    return run;
}
