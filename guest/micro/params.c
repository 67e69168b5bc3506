/* `key=value` parameters, checked against a table. The first mistake is answered, nothing is run. */
#include "micro.h"

bool decimal_parse(struct text text, u64 *value)
{
    *value = 0;
    for (u64 i = 0; i < text.length; i++) {
        u64 digit = (u64)(text.at[i] - '0');
        if (digit > 9 || *value > (U64_MAX - digit) / 10)
            return false;
        *value = *value * 10 + digit;
    }
    return text.length > 0;
}

static bool word_parse(struct text text, const struct param *param, u64 *value)
{
    for (*value = 0; *value <= param->max; ++*value)
        if (text_is(text, param->words[*value]))
            return true;
    return false;
}

static void put_expected(const struct param *param, u64 min, u64 max)
{
    reply_error(param->key);
    put(": expected ");
    if (param->words) {
        for (u64 i = 0; i <= max; i++) {
            put(i ? "|" : "");
            put(param->words[i]);
        }
    } else {
        put_decimal(min);
        put("..");
        put_decimal(max);
    }
    put(", came ");
}

bool param_within(const struct param *param, u64 min, u64 max)
{
    if (param->value >= min && param->value <= max)
        return true;
    if (min > max) {
        reply_error(param->key);
        put(": expected no such pages left, came ");
    } else {
        put_expected(param, min, max);
    }
    put_decimal(param->value);
    return false;
}

static void unknown_param(struct text word, const struct param *params, u64 count)
{
    reply_error(count ? "expected" : "expected no parameters");
    for (u64 i = 0; i < count; i++) {
        put_char(' ');
        put(params[i].key);
        put_char('=');
    }
    put(", came ");
    put_text(word);
}

static struct text split_at_equals(struct text *word)
{
    struct text key = {word->at, 0};
    while (key.length < word->length && key.at[key.length] != '=')
        key.length++;
    u64 skip = key.length < word->length ? key.length + 1 : key.length;
    word->at += skip;
    word->length -= skip;
    return key;
}

static bool param_set(struct param *param, struct text text)
{
    u64 value = 0;
    bool good = param->words ? word_parse(text, param, &value) : decimal_parse(text, &value);
    if (!good || value < param->min || value > param->max) {
        put_expected(param, param->min, param->max);
        put_text(text);
        return false;
    }
    if (param->given) {
        reply_error(param->key);
        put(": expected once, came twice");
        return false;
    }
    param->value = value;
    param->given = true;
    return true;
}

bool params_parse(struct text rest, struct param *params, u64 count)
{
    for (;;) {
        struct text word = next_word(&rest), value = word;
        if (!word.length)
            return true;
        struct text key = split_at_equals(&value);
        u64 i = 0;
        while (i < count && !text_is(key, params[i].key))
            i++;
        if (i == count) {
            unknown_param(word, params, count);
            return false;
        }
        if (!param_set(&params[i], value))
            return false;
    }
}
