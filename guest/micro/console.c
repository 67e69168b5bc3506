/* The serial console: polled input, unbuffered output. Every character costs an exit to the VMM, so answers are short. */
#include "micro.h"

#define UART_DATA 0x3f8
#define UART_LINE_STATUS 0x3fd
#define UART_INPUT_READY 1

static char line_buffer[LINE_MAX_CHARS];

void put_char(char c)
{
    /* The transmitter of an emulated UART is always empty: asking would double the exits. */
    outb(UART_DATA, (u8)c);
    tick();
}

void put(const char *string)
{
    while (*string)
        put_char(*string++);
}

/* Text that came from outside: what could break the line or the terminal is shown as '?'. */
void put_text(struct text text)
{
    for (u64 i = 0; i < text.length; i++)
        put_char(text.at[i] >= ' ' && text.at[i] < 127 ? text.at[i] : '?');
}

void put_decimal(u64 value)
{
    char digits[20];
    u64 n = 0;
    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        put_char(digits[--n]);
}

void put_hex(u64 value)
{
    int shift = 60;
    put("0x");
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put_char("0123456789abcdef"[value >> shift & 15]);
}

static void put_key(const char *key)
{
    put_char(' ');
    put(key);
    put_char('=');
}

void put_pair(const char *key, u64 value)
{
    put_key(key);
    put_decimal(value);
}

void put_pair_hex(const char *key, u64 value)
{
    put_key(key);
    put_hex(value);
}

bool text_is(struct text text, const char *string)
{
    u64 i = 0;
    while (i < text.length && string[i] == text.at[i])
        i++;
    return i == text.length && !string[i];
}

struct text next_word(struct text *rest)
{
    while (rest->length && *rest->at == ' ')
        rest->at++, rest->length--;
    struct text word = {rest->at, 0};
    while (rest->length && *rest->at != ' ')
        rest->at++, rest->length--, word.length++;
    return word;
}

static char read_char(void)
{
    while (!(inb(UART_LINE_STATUS) & UART_INPUT_READY)) {
        tick();
        if (balloon_due())
            balloon_poll(true);
        relax();
    }
    return (char)inb(UART_DATA);
}

bool read_line(struct text *line)
{
    u64 n = 0;
    char c;
    while ((c = read_char()) != '\n' && c != '\r') {
        if (n < LINE_MAX_CHARS)
            line_buffer[n] = c;
        n++;
    }
    line->at = line_buffer;
    line->length = n < LINE_MAX_CHARS ? n : LINE_MAX_CHARS;
    return n <= LINE_MAX_CHARS;
}
