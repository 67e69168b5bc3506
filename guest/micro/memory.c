/* Finds the RAM, maps it for ring 3, lays out the guest's own pages and numbers the rest as heap.
 *
 * From 1 MiB up: image | page tables | versions (1 byte a heap page) | touched (1 bit) | balloon's map (1 bit)
 * | samples | balloon's queues | heap.
 * Firecracker's own tables stay as they are: they map the first GiB only, and under a shadowing hypervisor every store
 * into a table in use is a trap. All RAM is mapped a second time instead, at WINDOW + physical, by tables that are
 * complete before one store into the root makes them known. A new entry needs no TLB flush, which ring 3 could not do. */
#include "micro.h"

#define E820_COUNT 0x1e8
#define E820_TABLE 0x2d0
#define E820_ENTRY_BYTES 20
#define E820_USABLE 1
#define MIB (1UL << 20)
#define GIB (1UL << 30)
#define RAM_END_MAX (128 * GIB) /* the tables must fit the 2 MiB that start.S opened */
#define TABLE_ENTRY 0x27UL /* present, writable, user, accessed */
#define LARGE_PAGE 0xe7UL  /* and dirty, 2 MiB: no walker ever writes to the tables */

extern u8 image_end[];
struct heap heap;

static u64 round_up(u64 value, u64 unit)
{
    return (value + unit - 1) / unit * unit;
}

static u64 load64(const u8 *at)
{
    u64 value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | at[i];
    return value;
}

static void add_region(u64 start, u64 end)
{
    start = round_up(start < MIB ? MIB : start, PAGE_BYTES);
    end = (end > RAM_END_MAX ? RAM_END_MAX : end) & -PAGE_BYTES;
    if (start >= end || heap.region_count == REGIONS_MAX)
        return;
    heap.regions[heap.region_count++] = (struct region){start, (end - start) / PAGE_BYTES};
    heap.memory_bytes += end - start;
}

static void find_ram(const u8 *zero_page)
{
    for (u64 i = 0; i < zero_page[E820_COUNT]; i++) {
        const u8 *entry = zero_page + E820_TABLE + i * E820_ENTRY_BYTES;
        u64 start = load64(entry);
        if (entry[16] == E820_USABLE)
            add_region(start, start + load64(entry + 8));
    }
}

static u64 region_end(const struct region *region)
{
    return region->address + region->pages * PAGE_BYTES;
}

/* Returns the first byte behind the tables. */
static u64 build_tables(u64 *directory_pointers, u64 *root)
{
    u64 *table = directory_pointers + PAGE_WORDS;
    for (u64 r = 0; r < heap.region_count; r++)
        for (u64 gib = heap.regions[r].address / GIB; gib * GIB < region_end(&heap.regions[r]); gib++) {
            if (directory_pointers[gib])
                continue;
            for (u64 i = 0; i < PAGE_WORDS; i++)
                table[i] = (gib * GIB + i * 2 * MIB) | LARGE_PAGE;
            directory_pointers[gib] = (u64)table | TABLE_ENTRY;
            table += PAGE_WORDS;
        }
    root[WINDOW / (512 * GIB)] = (u64)directory_pointers | TABLE_ENTRY;
    return (u64)table;
}

/* The scratch starts as zeros because the RAM of a fresh VM does. */
static void *reserve(u64 *next, u64 bytes)
{
    void *at = (void *)(WINDOW + *next);
    *next = round_up(*next + bytes, 64);
    return at;
}

bool memory_map(const u8 *zero_page, u64 *root)
{
    find_ram(zero_page);
    struct region *first = &heap.regions[0];
    if (!heap.region_count || first->address > (u64)image_end || region_end(first) < 2 * MIB)
        return false;
    u64 next = build_tables((u64 *)image_end, root);
    u64 most_pages = heap.memory_bytes / PAGE_BYTES;
    heap.versions = reserve(&next, most_pages);
    heap.touched = reserve(&next, most_pages / 8 + 8);
    balloon.map = reserve(&next, most_pages / 8 + 8);
    heap.samples = reserve(&next, SAMPLES_MAX * sizeof *heap.samples);
    next = round_up(next, PAGE_BYTES);
    balloon.memory = reserve(&next, PAGE_BYTES);
    if (next >= region_end(first))
        return false;
    first->pages = (region_end(first) - next) / PAGE_BYTES;
    first->address = next;
    for (u64 r = 0; r < heap.region_count; r++)
        heap.pages += heap.regions[r].pages;
    return true;
}

u64 page_address(u64 page)
{
    const struct region *region = heap.regions;
    for (; page >= region->pages; region++)
        page -= region->pages;
    return region->address + page * PAGE_BYTES;
}

u64 *page_words(u64 page)
{
    return (u64 *)(WINDOW + page_address(page));
}
