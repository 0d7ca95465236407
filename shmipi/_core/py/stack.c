/* SPDX-License-Identifier: MIT */
/* Frames of the interpreter are its own business: their layout is that of each version. */
#define Py_BUILD_CORE_MODULE 1
#include "py/stack.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#include <internal/pycore_frame.h>

#define DEPTH 64
#define NAME_MOST 120u
#define FILE_MOST 240u

typedef struct _PyInterpreterFrame Frame;

static bool peek(pid_t pid, const void *from, void *to, size_t n)
{
    struct iovec here = { to, n }, there = { (void *)(uintptr_t)from, n };
    if (process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)n)
        return true;
    if (pid != getpid() || errno == EFAULT)
        return false;
    /* A container forbids the call: then with the care that faulthandler takes, which is none. */
    memcpy(to, from, n);
    return true;
}

/* ---- strings ------------------------------------------------------------------------- */

static void say_string(pid_t pid, const void *object, uint32_t most, struct shi_text *out)
{
    PyASCIIObject head;
    uint8_t data[256];
    uint32_t i, width;
    if (!object || !peek(pid, object, &head, sizeof head) || !head.state.compact ||
        head.length < 0) {
        shi_text_str(out, "???");
        return;
    }
    const uint8_t *at = (const uint8_t *)object + (head.state.ascii
                                                       ? sizeof(PyASCIIObject)
                                                       : sizeof(PyCompactUnicodeObject));
    uint64_t length = (uint64_t)head.length, first = 0;
    width = head.state.kind;
    if (width != 1 && width != 2 && width != 4)
        return;
    if (length > most) { /* the end of a path tells more than its begin */
        shi_text_str(out, "...");
        first = length - most;
    }
    for (; first < length; first += i) {
        uint32_t n = (uint32_t)(sizeof data / width);
        if (n > length - first)
            n = (uint32_t)(length - first);
        if (!peek(pid, at + first * width, data, (size_t)n * width))
            return;
        for (i = 0; i < n; i++) {
            uint32_t c = 0;
            memcpy(&c, data + (size_t)i * width, width);
            char plain = c < ' ' || c > '~' ? '?' : (char)c;
            shi_text_add(out, &plain, 1);
        }
    }
}

/* ---- lines: Objects/locations.md of CPython -------------------------------------------- */

struct table {
    pid_t pid;
    const uint8_t *at;
    int64_t left;
    uint32_t i, n;
    uint8_t data[128];
};

static int next_byte(struct table *t)
{
    if (t->i == t->n) {
        uint32_t n = t->left < (int64_t)sizeof t->data ? (uint32_t)t->left : sizeof t->data;
        if (!n || !peek(t->pid, t->at, t->data, n))
            return -1;
        t->at += n;
        t->left -= n;
        t->n = n;
        t->i = 0;
    }
    return t->data[t->i++];
}

static uint32_t varint(struct table *t)
{
    uint32_t value = 0, shift = 0;
    int byte;
    do {
        byte = next_byte(t);
        if (byte < 0 || shift > 30)
            return value;
        value |= (uint32_t)(byte & 63) << shift;
        shift += 6;
    } while (byte & 64);
    return value;
}

static int svarint(struct table *t)
{
    uint32_t value = varint(t);
    return value & 1 ? -(int)(value >> 1) : (int)(value >> 1);
}

/* The line of the instruction at byte `offset`; 0: it has none. */
static int line_of(pid_t pid, const PyCodeObject *code, int64_t offset)
{
    struct table t = { .pid = pid };
    Py_ssize_t size;
    const PyBytesObject *bytes = (const PyBytesObject *)code->co_linetable;
    int line = code->co_firstlineno, byte;
    int64_t end = 0;
    if (!bytes || !peek(pid, &((const PyVarObject *)bytes)->ob_size, &size, sizeof size))
        return 0;
    t.at = (const uint8_t *)bytes->ob_sval;
    t.left = size;
    while ((byte = next_byte(&t)) >= 0 && byte & 0x80) {
        int kind = byte >> 3 & 15;
        end += ((byte & 7) + 1) * (int64_t)sizeof(_Py_CODEUNIT);
        if (kind == 14 || kind == 13)
            line += svarint(&t);
        else if (kind >= 10 && kind <= 12)
            line += kind - 10;
        if (kind == 14) {
            varint(&t);
            varint(&t);
            varint(&t);
        } else if (kind >= 10 && kind <= 12) {
            next_byte(&t);
            next_byte(&t);
        } else if (kind < 10) {
            next_byte(&t);
        }
        if (offset < end)
            return kind == 15 ? 0 : line;
    }
    return 0;
}

/* ---- frames ---------------------------------------------------------------------------- */

static const void *code_of(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030d0000
    return frame->f_executable;
#else
    return frame->f_code;
#endif
}

static const void *instruction_of(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030d0000
    return frame->instr_ptr;
#else
    return frame->prev_instr;
#endif
}

static bool is_shim(const Frame *frame)
{
#if PY_VERSION_HEX >= 0x030c0000
    return frame->owner == FRAME_OWNED_BY_CSTACK;
#else
    (void)frame;
    return false;
#endif
}

static const Frame *innermost(pid_t pid, const PyThreadState *state)
{
#if PY_VERSION_HEX >= 0x030d0000
    const Frame *frame;
    return peek(pid, &state->current_frame, &frame, sizeof frame) ? frame : NULL;
#else
    const _PyCFrame *inner;
    const Frame *frame;
    return peek(pid, &state->cframe, &inner, sizeof inner) && inner &&
                   peek(pid, &inner->current_frame, &frame, sizeof frame)
               ? frame
               : NULL;
#endif
}

static bool say_frame(pid_t pid, const Frame *frame, struct shi_text *out)
{
    const uint8_t *at = code_of(frame);
    PyCodeObject code;
    if (!at || !peek(pid, at, &code, offsetof(PyCodeObject, co_code_adaptive)) ||
        (pid == getpid() && Py_TYPE(&code) != &PyCode_Type))
        return false;
    int64_t offset = (const uint8_t *)instruction_of(frame) -
                     (at + offsetof(PyCodeObject, co_code_adaptive));
    int line = line_of(pid, &code, offset);
    shi_text_str(out, "  File \"");
    say_string(pid, code.co_filename, FILE_MOST, out);
    shi_text_str(out, "\", line ");
    if (line > 0)
        shi_text_num(out, (uint64_t)line, 10);
    else
        shi_text_str(out, "???");
    shi_text_str(out, " in ");
    say_string(pid, code.co_qualname, NAME_MOST, out);
    shi_text_str(out, "\n");
    return true;
}

bool shi_stack_write(const struct shi_slot *slot, pid_t pid, struct shi_text *out)
{
    const PyThreadState *state =
        (const PyThreadState *)(uintptr_t)shi_load_acquire(&slot->py_state);
    const Frame *outside = (const Frame *)(uintptr_t)shi_load_relaxed(&slot->py_outside);
    const Frame *at = state ? innermost(pid, state) : NULL;
    int depth;
    if (!at)
        return false;
    for (depth = 0; at && at != outside; depth++) {
        Frame frame;
        if (depth == DEPTH) {
            shi_text_str(out, "  ...\n");
            break;
        }
        if (!peek(pid, at, &frame, offsetof(Frame, localsplus)))
            break;
        if (!is_shim(&frame) && !say_frame(pid, &frame, out))
            shi_text_str(out, "  File \"???\", line ??? in ???\n");
        at = frame.previous;
    }
    return true;
}

void shi_stack_note(struct shi_slot *slot)
{
    PyThreadState *state = PyThreadState_Get();
    const Frame *outside = innermost(getpid(), state);
    shi_store_relaxed(&slot->py_outside, (uint64_t)(uintptr_t)outside);
    shi_store_release(&slot->py_state, (uint64_t)(uintptr_t)state);
}

void shi_stack_hook(struct shi_self *self, struct shi_text *out)
{
    shi_stack_write(self->slot, getpid(), out);
}

/* ---- this thread's, with the interpreter held ------------------------------------------- */

static void take_frame(struct shi_frame *at, const Frame *frame)
{
    while (frame && (is_shim(frame) || !code_of(frame) ||
                     !PyCode_Check((PyObject *)(uintptr_t)code_of(frame))))
        frame = frame->previous;
    *at = (struct shi_frame){ .frame = frame };
    if (frame) {
        at->code = (PyObject *)(uintptr_t)code_of(frame);
        at->instruction = instruction_of(frame);
    }
}

void shi_frame_begin(struct shi_frame *at)
{
    const PyThreadState *state = PyThreadState_Get();
#if PY_VERSION_HEX >= 0x030d0000
    take_frame(at, state->current_frame);
#else
    take_frame(at, state->cframe->current_frame);
#endif
}

void shi_frame_next(struct shi_frame *at)
{
    take_frame(at, ((const Frame *)at->frame)->previous);
}

const void *shi_code_begin(const PyCodeObject *code)
{
    return code->co_code_adaptive;
}
