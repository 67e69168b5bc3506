/* What every page must hold. Word i of page p is base(seed, p, version) + i * STEP; version 0 is all zeros. A page that is
 * lost, stale, swapped with another or torn in the middle is wrong in (nearly) every word. */
#include "micro.h"

#define STEP 0x9e3779b97f4a7c15UL /* odd: all words of a page differ */

extern const u64 image_start[], text_end[];

static u64 base_of(u64 page, u64 version)
{
    return draw(heap.seed, page << 8 | version);
}

u64 word_expected(u64 page, u64 word)
{
    u64 version = heap.versions[page];
    return version ? base_of(page, version) + word * STEP : 0;
}

static u64 count_wrong(u64 page, const u64 *words, struct wrong *wrong)
{
    u64 count = 0;
    for (u64 i = 0; i < PAGE_WORDS; i++) {
        u64 got = words[i], want = word_expected(page, i);
        if (got == want)
            continue;
        if (!wrong->words++) {
            wrong->page = page;
            wrong->word = i;
            wrong->got = got;
            wrong->want = want;
        }
        count++;
    }
    return count;
}

u64 page_check(u64 page, struct wrong *wrong)
{
    const u64 *words = page_words(page);
    u64 version = heap.versions[page];
    u64 want = version ? base_of(page, version) : 0, step = version ? STEP : 0, difference = 0;
    /* No branch a word: a good page costs hardly more than reading it. */
#pragma GCC unroll 8
    for (u64 i = 0; i < PAGE_WORDS; i++) {
        difference |= words[i] ^ want;
        want += step;
    }
    return difference ? count_wrong(page, words, wrong) : 0;
}

void page_write_next(u64 page)
{
    u64 *words = page_words(page), version = heap.versions[page];
    heap.written += !version;
    version = version == 255 ? 1 : version + 1;
    heap.versions[page] = (u8)version;
    u64 value = base_of(page, version);
#pragma GCC unroll 8
    for (u64 i = 0; i < PAGE_WORDS; i++) {
        words[i] = value;
        value += STEP;
    }
    while (heap.filled < heap.pages && heap.versions[heap.filled])
        heap.filled++;
}

u64 text_sum(void)
{
    u64 sum = 0;
    for (const u64 *word = image_start; word < text_end; word++)
        sum = mix(sum + *word);
    return sum;
}

void put_wrong(const struct wrong *wrong)
{
    if (!wrong->words)
        return;
    put_pair_hex("first_page", wrong->page);
    put_pair_hex("first_word", wrong->word);
    put_pair_hex("got", wrong->got);
    put_pair_hex("want", wrong->want);
}
