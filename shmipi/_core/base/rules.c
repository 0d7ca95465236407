/* SPDX-License-Identifier: MIT */
#include "base/sys.h"

#include "base/rules.h"

const struct shi_rule_text shi_rule_texts[SHI_RULE_COUNT + 1] = {
#define X(user, rule, function, what) { #user, #rule, function, what },
    SHI_RULES(X)
#undef X
        { NULL, NULL, NULL, NULL },
};
