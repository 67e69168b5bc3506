/* One command line in, one answer line out. */
#include "micro.h"

static struct text tag;

void reply(const char *beginning)
{
    if (tag.length) {
        put_text(tag);
        put_char(' ');
    }
    put(beginning);
}

void reply_ok(void)
{
    reply("ok");
}

void reply_error(const char *beginning)
{
    reply("error: ");
    put(beginning);
}

/* Looks before it calls: a ping is to need no page of code beyond this one. */
static void command_ping(struct text rest)
{
    if (!rest.length || params_parse(rest, 0, 0))
        reply("pong");
}

static void command_help(struct text rest);

static const struct command {
    const char *name;
    void (*run)(struct text rest);
} commands[] = {
    {"ping", command_ping},   {"help", command_help},   {"info", command_info},
    {"sweep", command_sweep}, {"check", command_check}, {"fresh", command_fresh},
    {"load", command_load},   {"loads", command_loads}, {"ticks", command_ticks},
    {"balloon", command_balloon},
};

static void command_help(struct text rest)
{
    if (!params_parse(rest, 0, 0))
        return;
    reply_ok();
    for (u64 i = 0; i < COUNT_OF(commands); i++) {
        put_char(' ');
        put(commands[i].name);
    }
}

/* A tag that is too long is not echoed: the caller could not match half of it. */
static bool take_tag(struct text *line)
{
    tag.length = 0;
    if (!line->length || *line->at != '#')
        return true;
    struct text word = next_word(line);
    if (word.length > TAG_MAX_CHARS + 1)
        return false;
    tag = word;
    return true;
}

static void dispatch(struct text line)
{
    struct text name = next_word(&line);
    for (u64 i = 0; i < COUNT_OF(commands); i++)
        if (text_is(name, commands[i].name)) {
            commands[i].run(line);
            return;
        }
    reply_error("expected a command (help names them), came ");
    if (name.length)
        put_text(name);
    else
        put("none");
}

static bool is_blank(struct text line)
{
    return !next_word(&line).length;
}

static void answer(bool whole, struct text line)
{
    bool tag_fits = take_tag(&line);
    if (!whole)
        reply_error("expected a line of at most 255 characters, came a longer one");
    else if (!tag_fits)
        reply_error("expected a tag of at most 32 characters, came a longer one");
    else
        dispatch(line);
    put_char('\n');
}

void serve(void)
{
    struct text line;
    for (;;) {
        bool whole = read_line(&line);
        /* Blank lines have no answer, so that CR LF counts as one end of line. */
        if (!whole || !is_blank(line))
            answer(whole, line);
    }
}
